"""The baselines: series adapter, parallel adapter, prefix tuning, each against a reference written here."""

import copy
import json
import pickle

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from torch import nn

import doratune
from doratune import UserError, baselines
from doratune.baselines import BaselineConfig

METHODS = ("series", "parallel", "prefix")
FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}


def tiny_qwen3(**changes):
    """Query and key norms, a head size that is not hidden / heads, two query heads a key head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=12)
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, **ends, **changes)).eval()


def tiny_mistral():
    """A sliding window of 4 tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, sliding_window=4)
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, **ends)).eval()


def tiny_gemma2():
    """Logits capped in attention, which only its eager function can; every second layer has a window."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8, sliding_window=4)
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, **ends)).eval()


def tiny_deepseek():
    """Keys are longer than values."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, first_k_dense_replace=2)
    heads = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6)
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **ends, num_attention_heads=4, num_key_value_heads=4)).eval()


FAMILIES = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "gpt2": tiny_gpt2,
    "mistral": tiny_mistral,
    "gemma2": tiny_gemma2,
    "deepseek": tiny_deepseek,
}


def config_for(method, family="llama", **changes):
    if method != "prefix" and family == "gpt2":
        changes = {"targets": ["c_fc", "mlp.c_proj"]} | changes
    return BaselineConfig(**{"method": method, "size": 5} | changes)


def away(model, scale=0.5):
    """Move a baseline from its start, for outputs that would not agree by chance."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in baselines.parameters(model).values():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model


def rows(lengths=(5, 9, 3, 12)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]


def padded(items):
    from doratune.evaluation.generate import left_pad

    ids, mask = left_pad(items, 0, "cpu")
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


IDS = torch.tensor(rows((7,)))


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["series", "parallel"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_start_is_the_base_bit_for_bit(family, method, dtype):
    model = FAMILIES[family]().to(dtype)
    base = logits(model)
    baselines.attach(model, config_for(method, family))
    out = logits(model)
    assert torch.equal(out, base) and out.dtype == dtype
    assert all(p.dtype == torch.float32 for p in baselines.parameters(model).values())


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu"])
@pytest.mark.parametrize("method", ["series", "parallel"])
def test_the_bottleneck_is_the_formula(method, activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 13))
    weight, bias = (p.detach().double() for p in model[0].parameters())
    baselines.attach(model, BaselineConfig(method=method, size=4, targets=["0"], scaling=0.7, activation=activation))
    away(model)
    x = torch.randn(3, 2, 10)
    with torch.no_grad():
        out = model(x)
    down, up = (getattr(model[0], f"adapter_{side}").detach().double() for side in ("down", "up"))
    y = x.double() @ weight.T + bias
    expected = y + 0.7 * FUNCTIONS[activation]((y if method == "series" else x.double()) @ down.T) @ up.T
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mixed = model(x)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.double(), expected, rtol=0.05, atol=0.05)
    assert torch.equal(model[0](input=x), out)  # by keyword too


@pytest.mark.parametrize("method", METHODS)
def test_only_the_baseline_learns(method):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    baselines.attach(model, config_for(method))
    if method != "prefix":
        away(model)
    own = baselines.parameters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(own)
    assert len(own) == {"series": 2 * 2, "parallel": 2 * 4, "prefix": 2 * 2}[method]
    optimizer = torch.optim.AdamW(own.values(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in own.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name not in own)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_saved_and_loaded(family, method, tmp_path):
    model = away(baselines.attach(FAMILIES[family](), config_for(method, family, seed=3)))
    base = logits(FAMILIES[family]())
    out = logits(model)
    assert (out - base).abs().max() > 1e-3
    baselines.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["baseline_config.json", "baseline_model.safetensors"]
    assert baselines.is_baseline(tmp_path) and not baselines.is_baseline(tmp_path / "other")
    again = baselines.load(FAMILIES[family](), tmp_path)
    assert torch.equal(logits(again), out)
    assert baselines.attached(again) == baselines.attached(model)
    assert not any(p.requires_grad for p in again.parameters())
    resumed = baselines.attach(FAMILIES[family](), config_for(method, family))
    baselines.load_weights(resumed, tmp_path)
    assert torch.equal(logits(resumed), out) and all(p.requires_grad for p in baselines.parameters(resumed).values())
    assert all(p.requires_grad for p in baselines.parameters(baselines.load(FAMILIES[family](), tmp_path, trainable=True)).values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_detach_restores_the_base(family, method):
    model = FAMILIES[family]()
    model.lm_head.weight.requires_grad_(False)
    classes, keys, base = [type(m) for m in model.modules()], list(model.state_dict()), logits(model)
    wanted, implementation = [p.requires_grad for p in model.parameters()], model.config._attn_implementation
    away(baselines.attach(model, config_for(method, family)))
    assert not torch.equal(logits(model), base)
    baselines.detach(model)
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == wanted and model.config._attn_implementation == implementation
    assert torch.equal(logits(model), base) and baselines.attached(model) is None
    doratune.attach(model, doratune.AdapterConfig(rank=2))


@pytest.mark.parametrize("method", METHODS)
def test_parameters_stay_wide_and_copies_agree(method):
    model = away(baselines.attach(tiny_llama(), config_for(method)))
    out, own = logits(model), [p.detach().clone() for p in baselines.parameters(model).values()]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), out)
        baselines.detach(twin)
        assert torch.equal(logits(twin), logits(tiny_llama()))
    assert torch.equal(logits(model), out)
    model.to(torch.bfloat16)
    assert all(
        p.dtype == torch.float32 and torch.equal(p, q) for p, q in zip(baselines.parameters(model).values(), own, strict=True)
    )
    low = logits(model)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), out, rtol=0.1, atol=0.05)


def with_cache(model, keys, values, ids):
    """The reference: the prefix as a cache of past tokens; positions of the real tokens start at 0."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(*(t.transpose(0, 1)[None].to(model.dtype).expand(len(ids), -1, -1, -1) for t in (k, v)), layer)
    mask = torch.ones(len(ids), len(keys[0]) + ids.shape[1], dtype=torch.long)
    positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_prefix_is_a_cache_of_past_tokens(family, implementation):
    model = FAMILIES[family]().double()
    model.set_attn_implementation(implementation)
    ids = torch.tensor(rows((6, 6)))
    away(baselines.attach(model, config_for("prefix")), 1.0)
    own, out = baselines.parameters(model), logits(model, ids)
    assert all(p.dtype == torch.float64 for p in own.values())
    keys, values = (
        [p.detach().clone() for name, p in own.items() if name.endswith(end)] for end in ("prefix_keys", "prefix_values")
    )
    baselines.detach(model)
    torch.testing.assert_close(out, with_cache(model, keys, values, ids), rtol=1e-10, atol=1e-11)
    assert (out - logits(model, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_single_rows_say(family, method):
    model = away(baselines.attach(FAMILIES[family](), config_for(method, family)))
    items = rows()
    together = logits(model, **(batch := padded(items)) | {"ids": batch.pop("input_ids")}, use_cache=False)[:, -1]
    for row, item in zip(together, items, strict=True):
        torch.testing.assert_close(row, logits(model, torch.tensor([item]))[0, -1], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_prefix(family, beams):
    model = away(baselines.attach(FAMILIES[family](), config_for("prefix")), 1.0)
    items, settings = rows(), dict(max_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=0, eos_token_id=299)
    batch = padded(items)
    del batch["position_ids"]  # generate makes them
    written = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()
    for new, item in zip(written, items, strict=True):
        one = torch.tensor([item])
        assert model.generate(input_ids=one, attention_mask=torch.ones_like(one), **settings)[0, len(item) :].tolist() == new
    if beams == 1:  # no cache, no masks: token by token
        ids = list(items[1])
        for token in written[1]:
            assert logits(model, torch.tensor([ids]), use_cache=False)[0, -1].argmax() == token
            ids.append(token)
    base = FAMILIES[family]().generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()
    assert base != written


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_gives_the_same_gradients(method, reentrant):
    found = []
    for checkpointed in (False, True):
        model = away(baselines.attach(tiny_llama(), config_for(method))).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**padded(rows()), labels=padded(rows())["input_ids"]).loss.backward()
        found.append([p.grad for p in baselines.parameters(model).values()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-8)


def test_a_missing_mask_is_causal():
    """A 4D mask of one's own goes through, and where a model makes none, earlier tokens are what it sees."""
    from doratune.baselines.prefix import _attend, _sdpa

    model = away(baselines.attach(tiny_llama(), config_for("prefix")))
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(logits(model, attention_mask=allowed), logits(model))
    layer = model.model.layers[0].self_attn
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)[None, None]
    torch.testing.assert_close(_sdpa(layer, query, key, value, None)[0], _sdpa(layer, query, key, value, mask)[0])
    everything = torch.ones_like(mask)
    torch.testing.assert_close(
        _sdpa(layer, query, key, value, None, is_causal=False)[0], _sdpa(layer, query, key, value, everything)[0]
    )
    with pytest.raises(UserError, match="position_bias"):
        _attend(None, layer, query, key, value, mask, position_bias=mask)


PAPER_7B = {
    # 30 tokens · 32 layers · (keys + values) · 4096 numbers
    "prefix": (30 * 32 * 2 * 4096, 0.1166),
    # 32 down_proj: down 256 × 4096, up 4096 × 256
    "series": (32 * 2 * 256 * 4096, 0.986),
    # 32 up_proj: down 256 × 4096, up 11008 × 256; 32 down_proj: down 256 × 11008, up 4096 × 256
    "parallel": (32 * 2 * 256 * (4096 + 11008), 3.542),
}
"""Method → (trainable numbers on LLaMA-7B, per cent). Table 1 says 0.11, 0.99 and 3.54: the first is cut, the others rounded."""


@pytest.mark.parametrize("method", METHODS)
def test_the_papers_parameter_shares(method):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # its defaults are LLaMA-7B
    trainable, own = baselines.count(model, BaselineConfig(method=method))
    assert (trainable, own) == (PAPER_7B[method][0], 6_738_415_616)
    assert 100 * trainable / (own + trainable) == pytest.approx(PAPER_7B[method][1], abs=5e-4)
    assert baselines.attached(model) is None and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_counting_is_what_attaching_gives(family, method):
    model, config = FAMILIES[family]().train(), config_for(method, family)
    trainable, own = baselines.count(model, config)
    assert own == sum(p.numel() for p in model.parameters()) and model.training
    baselines.attach(model, config)
    assert trainable == sum(p.numel() for p in baselines.parameters(model).values())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "serie"}, "method is 'serie'; expected one of series, parallel, prefix; did you mean 'series'"),
        ({"method": "series", "size": 0}, "size is 0; expected a whole number of numbers in the bottleneck, at least 1"),
        ({"method": "prefix", "size": 1.5}, "size is 1.5; expected a whole number of virtual tokens"),
        ({"method": "series", "scaling": 0}, "scaling is 0; expected a positive number"),
        (
            {"method": "series", "activation": "rellu"},
            "activation is 'rellu'; expected one of tanh, relu, gelu, silu; did you mean",
        ),
        ({"method": "series", "targets": []}, "targets is []; expected a regex or a list of module names"),
        ({"method": "prefix", "targets": ["q_proj"]}, "which method prefix does not have; drop targets"),
        ({"method": "prefix", "activation": "relu"}, "which method prefix does not have; drop activation"),
        ({"method": "series", "seed": -1}, "seed is -1"),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(UserError) as error:
        BaselineConfig(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def tied_models():
    model = tiny_llama()
    baselines.attach(model, config_for("prefix"))
    return type(model)(model.config)


def flash():
    model = tiny_llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


def gptj():
    from transformers import GPTJConfig, GPTJForCausalLM

    return GPTJForCausalLM(GPTJConfig(vocab_size=300, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64)).eval()


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    return BartForConditionalGeneration(BartConfig(vocab_size=300, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes))


def vit():
    from transformers import ViTConfig, ViTModel

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    return ViTModel(ViTConfig(image_size=16, patch_size=4, **sizes))


def meta():
    with torch.device("meta"):
        return tiny_llama()


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (
            tiny_llama,
            {"method": "series", "targets": ["down_prj"]},
            "'down_prj' matches no module of this model; did you mean 'down_proj'",
        ),
        (tiny_gpt2, {"method": "parallel"}, "'up_proj' matches no module"),
        (tiny_llama, {"method": "series", "targets": ["embed_tokens"]}, "goes on linear layers; leave the others out"),
        (tiny_llama, {"method": "series", "targets": ["norm"]}, "has no adapter"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {"method": "prefix"}, "is no model of transformers"),
        (bart, {"method": "prefix"}, "is an encoder-decoder"),
        (vit, {"method": "prefix"}, "does not take two tokens"),
        (gptj, {"method": "prefix"}, "does not call its attention through transformers' interface"),
        (flash, {"method": "prefix"}, "attn_implementation is 'flash_attention_2', which takes no prefix"),
        (tied_models, {"method": "prefix"}, "shares its config"),
        (meta, {"method": "prefix"}, "on the meta device"),
        (meta, {"method": "series"}, "on the meta device"),
    ],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(make, config, message):
    model = make()
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(UserError) as error:
        baselines.attach(model, BaselineConfig(**config))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == implementation


@pytest.mark.parametrize("method", METHODS)
def test_one_thing_at_a_time(method, tmp_path):
    model = baselines.attach(tiny_llama(), config_for(method))
    baselines.save(model, tmp_path / "baseline")
    for second in (lambda: baselines.attach(model, config_for("series")), lambda: baselines.load(model, tmp_path / "baseline")):
        with pytest.raises(UserError, match="has a baseline already"):
            second()
    adapted = doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    doratune.save(adapted, tmp_path / "adapter")
    with pytest.raises(UserError, match="has an adapter already"):
        doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    with pytest.raises(UserError, match="has an adapter already"):
        doratune.load(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="has a doratune adapter already"):
        baselines.attach(adapted, config_for(method))
    for use in (baselines.detach, baselines.parameters, lambda m: baselines.save(m, tmp_path)):
        with pytest.raises(UserError, match="no baseline is attached"):
            use(adapted)


@pytest.mark.parametrize("method", METHODS)
def test_under_torch_compile(method):
    model = away(baselines.attach(tiny_llama(), config_for(method)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, logits(model))
    compiled(**inputs, labels=IDS).loss.backward()
    grads = [p.grad.clone() for p in baselines.parameters(model).values()]
    model.zero_grad()
    model(**inputs, labels=IDS).loss.backward()
    for p, grad in zip(baselines.parameters(model).values(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-7)


def test_a_static_cache_holds_no_prefix():
    model = away(baselines.attach(tiny_llama(), config_for("prefix")), 1.0)
    batch = padded(rows())
    del batch["position_ids"]
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=299)
    static = model.generate(**batch, **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(**batch, **settings))


def test_a_changed_attention_is_no_lost_prefix():
    model = baselines.attach(tiny_llama(), config_for("prefix"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="drops the prefix"):
        logits(model)


@pytest.mark.parametrize("method", METHODS)
def test_quantized_models_are_refused(method):
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    layer = bnb.nn.Linear4bit(32, 32, bias=False, quant_type="nf4")
    layer.load_state_dict(model.model.layers[0].self_attn.q_proj.state_dict())
    model.model.layers[0].self_attn.q_proj = layer.to("cpu")
    for use in (baselines.attach, baselines.count):
        with pytest.raises(UserError, match=r"q_proj is quantized .bitsandbytes 4 bit.; baselines need an unquantized model"):
            use(model, config_for(method))


def edit(change):
    def apply(folder):
        path = folder / "baseline_config.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "baseline_config.json").unlink(), "baseline_config.json is missing"),
        (lambda f: (f / "baseline_model.safetensors").unlink(), "baseline_model.safetensors is missing"),
        (lambda f: (f / "baseline_model.safetensors").write_bytes(b"no"), "is truncated or corrupt"),
        (lambda f: (f / "baseline_config.json").write_text("{"), "is not valid JSON"),
        (edit(lambda v: v.pop("baseline")), "has no object 'baseline'"),
        (edit(lambda v: v["baseline"].pop("method")), "method is missing"),
        (edit(lambda v: v["baseline"].update(sice=3)), "unknown baseline setting 'sice'; did you mean 'size'"),
        (edit(lambda v: v["baseline"].update(size=6)), "adapter_down is (5, 32), expected (6, 32)"),
        (edit(lambda v: v["baseline"].update(targets=["up_proj"])), "has no place in this model"),
        (edit(lambda v: v["baseline"].update(targets=["up_proj", "down_proj"])), "up_proj.adapter_down is missing"),
    ],
)
def test_a_spoiled_folder_is_one_line(spoil, message, tmp_path):
    baselines.save(baselines.attach(tiny_llama(), config_for("series")), tmp_path)
    spoil(tmp_path)
    model = tiny_llama()
    with pytest.raises(UserError) as error:
        baselines.load(model, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert baselines.attached(model) is None and all(p.requires_grad for p in model.parameters())


def test_numbers_that_are_none_are_refused(tmp_path):
    model = baselines.attach(tiny_llama(), config_for("series"))
    with torch.no_grad():
        next(iter(baselines.parameters(model).values()))[0, 0] = float("nan")
    baselines.save(model, tmp_path)
    with pytest.raises(UserError, match="other things than finite numbers"):
        baselines.load(tiny_llama(), tmp_path)
    with pytest.raises(UserError, match="says size 5, the attached baseline 4"):
        baselines.load_weights(baselines.attach(tiny_llama(), config_for("series", size=4)), tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        baselines.load(tiny_llama(), tmp_path / "nothing")


def test_importing_it_needs_only_torch():
    import subprocess
    import sys

    code = (
        "import sys, torch, doratune; from doratune import baselines; from torch import nn\n"
        "m = baselines.attach(nn.Sequential(nn.Linear(3, 3)), baselines.BaselineConfig(method='series', size=2, targets=['0']))\n"
        "m(torch.ones(1, 3)); print('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
