"""What PEFT writes beside A, B and m by default: base weights of embeddings and heads, tied ones, modules trained whole by the end
of their names, starts that leave the base alone. Each folder is made by PEFT and compared with PEFT's own reload."""

import peft
import pytest
import torch
from conftest import randomize, tiny_llama
from safetensors.torch import load_file, save_file

import doratune
from doratune import AdapterConfig
from doratune.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT says what it writes

IDS = torch.arange(3, 15)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def tied():
    model = tiny_llama(tie=True)
    with torch.no_grad():
        model.lm_head.weight[0] = 0.02  # the padding row, without direction
    return model


def resized(seed=1):
    model = tiny_llama()
    torch.manual_seed(seed)
    model.resize_token_embeddings(310)
    return model


def peft_folder(folder, build, **settings):
    """A folder of PEFT's, and the logits of PEFT's reload."""
    torch.manual_seed(0)
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=9, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    return logits(peft.PeftModel.from_pretrained(build(), folder).eval())


CASES = {
    "lm_head": (tiny_llama, {"use_dora": True, "target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight"),
    "embed_tokens": (tiny_llama, {"use_dora": True, "target_modules": ["embed_tokens"]}, "embed_tokens.base_layer.weight"),
    "both": (tiny_llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, "lm_head.base_layer.weight"),
    "resized": (resized, {"use_dora": True, "target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight"),
    "tied head": (tied, {"use_dora": True, "target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight"),
    "tied embedding": (tied, {"use_dora": True, "target_modules": ["embed_tokens"]}, "embed_tokens.base_layer.weight"),
    "ensured tie, embedding": (
        tied,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        "lm_head.base_layer.weight",
    ),
    "ensured tie, head": (tied, {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, "lm_head.lora_A.weight"),
    "ensured tie, trained whole": (
        tied,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "lm_head.weight",
    ),
    "the end of a name": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "input_layernorm.weight"),
    "the end of others": (
        tiny_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["attention_layernorm"]},
        "post_attention_layernorm.weight",
    ),
    "orthogonal": (tiny_llama, {"use_dora": True, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, ""),
    "eva": (tiny_llama, {"target_modules": ["q_proj"], "init_lora_weights": "eva", "eva_config": peft.EvaConfig()}, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_it_loads_as_peft_loads_it_and_goes_back(name, tmp_path):
    build, settings, extra = CASES[name]
    expected = peft_folder(tmp_path / "theirs", build, **settings)
    if name == "the end of a name":
        extra = "model.norm.weight"  # PEFT names it alone; the others end in layernorm
    assert any(key.endswith(extra) for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    model = build()
    base, keys = logits(model), list(model.state_dict())
    doratune.load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)
    doratune.save(model, tmp_path / "ours")
    theirs_again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs_again), expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(logits(doratune.load(build(), tmp_path / "ours")), logits(model))
    doratune.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)
    doratune.unmerge(model)
    doratune.detach(model)
    assert torch.equal(logits(model), base)
    assert list(model.state_dict()) == keys
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_other_base_values_are_used_and_written_again(name, tmp_path):
    """As PEFT does: the file's frozen weight takes the place of the model's, and detach gives the model's back."""
    build, settings, _ = CASES[name]
    peft_folder(tmp_path / "theirs", build, **settings)
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("base_layer.weight"))
    tensors[key] = tensors[key] * 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    expected = logits(peft.PeftModel.from_pretrained(build(), tmp_path / "theirs").eval())
    model = build()
    base = logits(model)
    doratune.load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)
    doratune.merge(model)
    doratune.save(model, tmp_path / "ours")
    torch.testing.assert_close(logits(doratune.load(build(), tmp_path / "ours")), expected, rtol=1e-4, atol=2e-5)
    theirs_again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs_again), expected, rtol=1e-4, atol=2e-5)
    doratune.unmerge(model)
    doratune.detach(model)
    assert torch.equal(logits(model), base)


def test_rows_that_the_file_added_come_from_the_file(tmp_path):
    """Resized with random new rows in both processes: the file's are used, where nothing of the vocabulary is adapted."""
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")

    def build(seed):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(310)
        return model

    peft_folder(tmp_path / "theirs", lambda: build(1), use_dora=True, target_modules=["q_proj"])
    expected = logits(peft.PeftModel.from_pretrained(build(2), tmp_path / "theirs").eval())
    torch.testing.assert_close(logits(doratune.load(build(3), tmp_path / "theirs")), expected, rtol=1e-4, atol=2e-5)
    model = tiny_llama()
    with pytest.raises(
        UserError, match=r"shape \(310, 32\), the model's has \(300, 32\); call model\.resize_token_embeddings\(310\)"
    ):
        doratune.load(model, tmp_path / "theirs")
    assert not list(doratune.adapters(model))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_starts_that_change_the_base_say_so(start, tmp_path):
    peft_folder(tmp_path, tiny_llama, target_modules=["q_proj"], init_lora_weights=start)
    with pytest.raises(UserError, match=f"init_lora_weights='{start}' \\(it changes the base weights"):
        doratune.load(tiny_llama(), tmp_path)


def test_a_start_that_is_not_known_gives_no_reason_that_nobody_checked(tmp_path):
    peft_folder(tmp_path, tiny_llama, target_modules=["q_proj"], init_lora_weights="mica")
    with pytest.raises(UserError, match=r"init_lora_weights='mica': not supported"):
        doratune.load(tiny_llama(), tmp_path)


@pytest.mark.parametrize("also_train", [["norm"], ["layers.0.input_layernorm", "norm"], ["input_layernorm"]])
def test_peft_trains_whole_what_we_did(also_train, tmp_path):
    """An entry of ours goes by whole parts of a name, PEFT's by the end of it: what is written says the same there."""
    model = randomize(doratune.attach(tiny_llama(), AdapterConfig(rank=4, targets=["q_proj"], also_train=also_train)))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.dim() == 1:
                p.mul_(1.1)
    doratune.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=2e-5)
    assert torch.equal(logits(doratune.load(tiny_llama(), tmp_path)), logits(model))


def test_where_peft_would_train_more_its_prefix_says_which(tmp_path):
    """In a bare backbone the last norm's name is the end of every other norm's."""
    model = doratune.attach(tiny_llama().model, AdapterConfig(rank=4, targets=["q_proj"], also_train=["norm"]))
    with torch.no_grad():
        model.norm.weight.mul_(1.5)
    doratune.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama().model, tmp_path).eval()
    with torch.no_grad():
        expected = model(IDS).last_hidden_state
        torch.testing.assert_close(theirs(IDS).last_hidden_state, expected, rtol=1e-4, atol=2e-5)
        assert torch.equal(doratune.load(tiny_llama().model, tmp_path)(IDS).last_hidden_state, expected)


@pytest.mark.parametrize("name", [name for name, (_, settings, _) in CASES.items() if "init_lora_weights" not in settings])
def test_merging_a_checkpoint_gives_the_same(name, tmp_path):
    """Shard by shard, from a folder that stores a tied weight once."""
    from transformers import AutoModelForCausalLM

    from doratune.checkpoint.merge import merge_checkpoint

    build, settings, _ = CASES[name]
    build().save_pretrained(tmp_path / "base")
    expected = peft_folder(tmp_path / "theirs", build, **settings)
    merge_checkpoint(str(tmp_path / "base"), tmp_path / "theirs", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=2e-5)
