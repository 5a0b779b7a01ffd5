"""PEFT's file format, both ways, with unmodified PEFT as the second oracle (fp32)."""

import json
import shutil

import peft
import pytest
import torch
from conftest import one_layer, randomize, tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file

import doratune
from doratune import AdapterConfig
from doratune.errors import UserError

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def peft_logits(build, folder):
    return logits(peft.PeftModel.from_pretrained(build(), folder).eval())


OURS = {
    "dora": AdapterConfig(rank=4, targets=["q_proj", "v_proj", "down_proj"]),
    "lora": AdapterConfig(method="lora", rank=4, targets=["q_proj", "up_proj"]),
    "regex": AdapterConfig(rank=4, targets=r"model\.layers\.1\..*(q|o)_proj"),
    "all linear": AdapterConfig(rank=2, alpha=3),
    "rslora": AdapterConfig(rank=4, rank_scaling="rslora", targets=["k_proj"]),
    "overrides": AdapterConfig(
        rank=4,
        targets=["q_proj", "v_proj"],
        rank_overrides={"layers.0.self_attn.q_proj": 2, "v_proj": 3},
        alpha_overrides={"layers.1.self_attn.v_proj": 30},
    ),
    "magnitude only": AdapterConfig(rank=4, targets=["q_proj"], magnitude_only=["o_proj", "gate_proj"]),
    "excluded": AdapterConfig(rank=4, targets=["q_proj", "v_proj"], exclude=["layers.0.self_attn.v_proj"]),
    "also train": AdapterConfig(rank=4, targets=["q_proj"], also_train=["lm_head", "input_layernorm"]),
    "dropout": AdapterConfig(rank=4, dropout=0.1, targets=["q_proj"]),
    "full gradient": AdapterConfig(rank=4, norm_gradient="full", targets=["q_proj"]),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_in_peft_and_back(name, tmp_path):
    model = tiny_llama()
    doratune.attach(model, OURS[name])
    randomize(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.dim() >= 1:
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    expected = logits(model)
    assert (expected - logits(tiny_llama())).abs().max() > 1e-3
    doratune.save(model, tmp_path)
    torch.testing.assert_close(peft_logits(tiny_llama, tmp_path), expected, **TOLERANCE)
    again = doratune.load(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), expected)
    assert not any(p.requires_grad for p in again.parameters())
    doratune.merge(model)
    doratune.save(model, tmp_path / "merged")  # a merged model still knows its adapter
    assert torch.equal(logits(doratune.load(tiny_llama(), tmp_path / "merged")), expected)


def test_conv1d_in_peft(tmp_path):
    model = tiny_gpt2()
    doratune.attach(model, AdapterConfig(rank=4, targets=["c_attn", "c_proj"]))
    randomize(model)
    doratune.save(model, tmp_path)
    torch.testing.assert_close(peft_logits(tiny_gpt2, tmp_path), logits(model), **TOLERANCE)


THEIRS = {
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "lora": {"target_modules": ["v_proj"]},
    "patterns": {
        "use_dora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.1\..*q_proj": 2, "v_proj": 7},
        "alpha_pattern": {"q_proj": 20},
    },
    "rslora": {"use_dora": True, "use_rslora": True, "target_modules": ["o_proj"]},
    "regex": {"use_dora": True, "target_modules": r".*layers\.0.*(up|down)_proj"},
    "saved": {"use_dora": True, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "exclude": {"use_dora": True, "target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1.*v_proj"},
    "some layers": {"use_dora": True, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "all linear": {"use_dora": True, "target_modules": "all-linear"},
    "gaussian": {"use_dora": True, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


def save_theirs(folder, build=tiny_llama, **settings):
    torch.manual_seed(3)
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=9, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.mul_(1.2).add_(0.05 * torch.randn_like(p)) if "magnitude" in name else p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    return logits(model.eval())


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_in_ours(name, tmp_path):
    expected = save_theirs(tmp_path, **THEIRS[name])
    model = doratune.load(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)
    doratune.save(model, tmp_path / "again")
    torch.testing.assert_close(peft_logits(tiny_llama, tmp_path / "again"), expected, **TOLERANCE)


def test_saved_head_of_a_tied_model(tmp_path):
    build = lambda: tiny_llama(tie=True)  # noqa: E731
    with pytest.warns(UserWarning, match="tie"):
        expected = save_theirs(tmp_path, build, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = doratune.load(build(), tmp_path)
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)
    base = build()
    doratune.detach(model)
    assert torch.equal(logits(model), logits(base))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("spelling", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_both_spellings_of_the_magnitude(spelling, tmp_path):
    expected = save_theirs(tmp_path, use_dora=True, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {k.replace("lora_magnitude_vector", spelling) if "magnitude" in k else k: t for k, t in tensors.items()}
    assert any(k.endswith(spelling) for k in renamed)
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(logits(doratune.load(tiny_llama(), tmp_path)), expected, **TOLERANCE)


def llama_with_a_zero_row():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    return model


def test_zero_rows_compute_the_same_in_peft(tmp_path):
    model = llama_with_a_zero_row()
    doratune.attach(model, AdapterConfig(rank=4, targets=["q_proj"]))
    randomize(model)
    doratune.save(model, tmp_path)
    torch.testing.assert_close(peft_logits(llama_with_a_zero_row, tmp_path), logits(model), **TOLERANCE)


@pytest.mark.parametrize("kind", ["magnitude only", "untrained"])
def test_zero_rows_are_never_nan_in_peft(kind, tmp_path):
    """A row that is 0 altogether is 0/0 in PEFT; what is saved must not let that happen."""

    model = llama_with_a_zero_row()
    doratune.attach(
        model,
        AdapterConfig(
            rank=4, **({"targets": ["q_proj"]} if kind == "untrained" else {"targets": [], "magnitude_only": ["q_proj"]})
        ),
    )
    doratune.save(model, tmp_path)
    torch.testing.assert_close(peft_logits(llama_with_a_zero_row, tmp_path), logits(model), **TOLERANCE)


def test_a_plain_module_loads_in_peft(tmp_path):
    """No generation methods: the task type must not be CAUSAL_LM."""
    build = lambda: one_layer()[0]  # noqa: E731
    model = randomize(build())
    doratune.save(model, tmp_path)
    base = build()
    doratune.detach(base)
    x = torch.randn(3, 10)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(x), model(x), **TOLERANCE)


def test_entries_that_name_nothing_here_are_passed_over(tmp_path):
    """PEFT writes `modules_to_save: [classifier, score]` for every classifier, and asks for one hit among the targets."""
    expected = save_theirs(tmp_path, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    edit(tmp_path, modules_to_save=["lm_head", "score"], target_modules=["q_proj", "W_pack"], exclude_modules=["vision"])
    torch.testing.assert_close(logits(doratune.load(tiny_llama(), tmp_path)), expected, **TOLERANCE)


def test_the_two_descriptions_must_agree(tmp_path):
    model = tiny_llama()
    doratune.attach(model, AdapterConfig(rank=4, targets=["q_proj"]))
    doratune.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 64}))
    with pytest.raises(UserError, match=r"says alpha 8, adapter_config\.json says 64"):
        doratune.load(tiny_llama(), tmp_path)


def test_input_axis_is_never_written_as_peft(tmp_path):
    model = tiny_llama()
    doratune.attach(model, AdapterConfig(rank=4, targets=["q_proj"], magnitude_axis="input"))
    randomize(model)
    with pytest.raises(UserError, match="one magnitude per input column"):
        doratune.save(model, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
    doratune.save(model, tmp_path)
    with pytest.raises(KeyError, match="DORATUNE"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    again = doratune.load(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "doratune.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": "sixteen"}, "r is 'sixteen'; expected a whole number"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; expected true or false"),
        ({"r": 0}, "rank is 0"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"rank_pattern": {"q_proj": "two"}}, "rank_pattern"),
        ({"some_new_feature": {"on": True}}, "some_new_feature"),
    ],
)
def test_fields_that_are_refused(change, message, tmp_path):
    save_theirs(tmp_path, use_dora=True, target_modules=["q_proj"])
    edit(tmp_path, **change)
    model = tiny_llama()
    with pytest.raises(UserError) as caught:
        doratune.load(model, tmp_path)
    assert message in str(caught.value)
    assert not list(doratune.adapters(model))


def test_all_mismatches_in_one_message(tmp_path):
    save_theirs(tmp_path, use_dora=True, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    tensors[names[0]] = torch.zeros(9, 9)
    del tensors[names[1]]
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(tensors, path)
    model = tiny_llama()
    with pytest.raises(UserError) as caught:
        doratune.load(model, tmp_path)
    text = str(caught.value)
    assert "has shape (9, 9)" in text
    assert "is missing" in text
    assert "layers.7.mlp.up_proj.lora_A fits nothing" in text
    assert "\n" not in text
    assert not list(doratune.adapters(model))


def test_broken_files(tmp_path):
    save_theirs(tmp_path, use_dora=True, target_modules=["q_proj"])
    tensors = tmp_path / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    for content, message in ((whole[: len(whole) // 2], "truncated or corrupt"), (b"rubbish", "truncated or corrupt")):
        tensors.write_bytes(content)
        with pytest.raises(UserError, match=message):
            doratune.load(tiny_llama(), tmp_path)
    tensors.unlink()
    with pytest.raises(UserError, match="is missing"):
        doratune.load(tiny_llama(), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="never loaded"):
        doratune.load(tiny_llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{broken")
    with pytest.raises(UserError, match="not valid JSON"):
        doratune.load(tiny_llama(), tmp_path)
    shutil.rmtree(tmp_path)
    doratune.save(one_layer()[0], tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match=r"did you mean .*adapter"):
        doratune.load(tiny_llama(), tmp_path / "run")
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        doratune.load(tiny_llama(), tmp_path)


def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch):
    model, layer = one_layer()
    doratune.save(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    randomize(model)

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("doratune.support.files.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        doratune.save(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
