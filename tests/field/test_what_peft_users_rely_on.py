"""Behaviours that PEFT's public test-suite shows users rely on, where no other test shows them: had, or refused with the reason."""

import peft
import pytest
import torch
from conftest import randomize, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import doratune
from doratune import AdapterConfig, UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

IDS = torch.arange(3, 15)[None]
QV = AdapterConfig(rank=2, targets=["q_proj", "v_proj"])


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def attached(base=tiny_llama, **settings):
    return randomize(doratune.attach(base(), AdapterConfig(**{"rank": 2} | settings)))


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=2, **sizes)).eval()


NOT_READ = {
    "bias": (tiny_llama, {"target_modules": ["q_proj"], "bias": "all"}, "bias='all'"),
    "bias of the adapted layers": (tiny_gpt2, {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}, "bias="),
    "lora_bias": (tiny_gpt2, {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}, "lora_bias=True"),
    "rows of an embedding": (
        tiny_llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
        "trainable_token_indices=",
    ),
    "rows of a named embedding": (
        tiny_llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}},
        "trainable_token_indices=",
    ),
    "parameters": (mixtral, {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}, "target_parameters="),
    "replicated layers": (tiny_llama, {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
    "activated LoRA": (tiny_llama, {"target_modules": ["q_proj"], "alora_invocation_tokens": [3]}, "alora_invocation_tokens="),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_folders_of_peft_that_say_more_than_we_honour(name, tmp_path):
    base, settings, message = NOT_READ[name]
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(base(), config).save_pretrained(tmp_path)
    model = base()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(UserError, match=f"{message}.*: not supported, and ignoring it would change the result"):
        doratune.load(model, tmp_path)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert len(before) == len(model.state_dict())


@pytest.mark.parametrize("keep", ["cpu", "device"])
def test_merged_twice_disabled_or_loaded_over_while_merged(keep, tmp_path):
    model = attached()
    doratune.save(model, tmp_path / "adapter")
    expected = logits(model)
    doratune.merge(model, keep=keep)
    merged = logits(model)
    for call, text in (
        (lambda: doratune.merge(model), r"merged already; call doratune\.unmerge\(model\) first"),
        (lambda: doratune.disabled(model).__enter__(), r"is merged; call doratune\.unmerge\(model\)"),
        (lambda: doratune.mixed(model, ["default"]).__enter__(), r"is merged; call doratune\.unmerge\(model\)"),
        (lambda: doratune.load(model, tmp_path / "adapter", name="b"), r"is merged; call doratune\.unmerge"),
        (lambda: doratune.use(model, None), r"is merged; call doratune\.unmerge"),
        (lambda: doratune.delete(model, "default"), r"is merged; call doratune\.unmerge"),
    ):
        with pytest.raises(UserError, match=text):
            call()
        assert torch.equal(logits(model), merged)
    doratune.save(model, tmp_path / "while merged")  # the adapter, not the merged weights
    doratune.unmerge(model)
    assert torch.equal(logits(model), expected)
    with pytest.raises(UserError, match="nothing to unmerge"):
        doratune.unmerge(model)
    assert torch.equal(logits(doratune.load(tiny_llama(), tmp_path / "while merged")), expected)


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("merged", [False, True])
def test_inputs_as_embeddings(base, merged):
    model = attached(base)
    if merged:
        doratune.merge(model)
    embeds = model.get_input_embeddings()(IDS).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, logits(model), rtol=1e-5, atol=1e-6)
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    from_embeds = model.generate(inputs_embeds=embeds, **settings)
    assert torch.equal(from_embeds, model.generate(IDS, **settings)[:, IDS.shape[1] :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_generation_in_half_precision_with_positional_inputs(dtype):
    model = attached(lambda: tiny_llama(dtype=dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}  # PEFT: autocast_adapter_dtype
    out = model.generate(IDS, max_new_tokens=4, do_sample=False)
    expected = IDS
    for _ in range(4):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, expected)


def test_our_folder_in_peft_s_auto_classes(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = randomize(doratune.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), QV))
    doratune.save(model, tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_still_on_the_meta_device():
    """PEFT: low_cpu_mem_usage."""
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(UserError, match=r"meta device; load the model's weights before attaching"):
        doratune.attach(model, QV)


def test_gradients_of_one_adapter_among_several():
    """PEFT: only the active adapter is trained; the others get no gradient and are no parameters of an optimizer."""
    model = attached(targets=["q_proj"])
    doratune.attach(model, AdapterConfig(rank=2, targets=["v_proj"]), name="b")
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"model.layers.{i}.self_attn.v_proj.{leaf}" for i in (0, 1) for leaf in ("lora_A", "lora_B", "magnitude")}
    assert sum(len(group["params"]) for group in doratune.parameter_groups(model)) == len(trained)


def test_an_adapter_swapped_under_a_compiled_model():
    """PEFT: hotswap_adapter. Without gradients, compiled once for each adapter."""
    torch.compiler.reset()
    model = attached(targets=["q_proj"])
    compiled = torch.compile(model, backend="eager")
    first = logits(compiled)
    randomize(doratune.attach(model, AdapterConfig(rank=4, targets=["q_proj", "up_proj"]), name="b"), seed=3)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(compiled), first)
    doratune.use(model, "default")
    torch.testing.assert_close(logits(compiled), first, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("target_modules", "PEFT's target_modules is targets here"),
        ("r", "PEFT's r is rank here"),
        ("layers_to_transform", "PEFT's layers_to_transform is layers here"),
        ("trainable_token_indices", r"is also_train or targets of the embedding \(all its rows\) here"),
        ("target_parameters", r"is targets \(a module of experts by its name\) here"),
        ("bias", "unknown adapter setting 'bias'$"),
        ("ignore_mismatched_sizes", "unknown adapter setting 'ignore_mismatched_sizes'"),
    ],
)
def test_peft_s_names_of_settings(name, said):
    with pytest.raises(UserError, match=said):
        AdapterConfig.from_dict({name: None})


def test_default_targets_whatever_the_architecture():
    """PEFT has a table by architecture and refuses others; here every linear layer but the head, of any model."""
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    for model, count in (
        (tiny_llama(), 14),
        (tiny_gpt2(), 8),
        (BertModel(BertConfig(vocab_size=64, **small)), 7),
        (T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)), 16),
        (torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)), 2),
    ):
        doratune.attach(model, AdapterConfig(rank=2))
        assert len(list(doratune.adapters(model))) == count
