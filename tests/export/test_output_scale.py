"""LoRA + output scale: the file alone, with the definition that it holds, gives the adapted layers' outputs."""

import json

import pytest
import torch
from conftest import randomize
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import doratune
from doratune import UserError
from doratune.cli.main import main
from doratune.export.output_scale import export_scaled

LINEAR = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 40)[None]


def adapter(folder, tmp_path, change=lambda model: None, **config):
    model = AutoModelForCausalLM.from_pretrained(folder)
    change(model)
    doratune.attach(model, doratune.AdapterConfig(**{"rank": 4, "targets": LINEAR} | config))
    doratune.save(randomize(model), tmp_path / "adapter")
    return model


def through_the_file(base, folder):
    """The plain base model with forward hooks that do what the definition says, and nothing else."""
    model = AutoModelForCausalLM.from_pretrained(base)
    described = json.loads((folder / "lora_scale.json").read_text())
    with safe_open(folder / "lora_scale.safetensors", "pt") as file:
        assert file.metadata()["definition"] == described["definition"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name, facts in described["layers"].items():
        A, B, scale = (tensors.get(f"{name}.{key}") for key in ("lora_A", "lora_B", "output_scale"))

        def hook(module, args, out, A=A, B=B, scale=scale, s=facts["scaling"]):
            bias = 0 if module.bias is None else module.bias
            return scale * (out - bias + (0 if A is None else s * (args[0] @ A.T @ B.T))) + bias

        model.get_submodule(name).register_forward_hook(hook)
    return model


@pytest.mark.parametrize("config", [{}, {"rank_scaling": "rslora"}, {"method": "lora"}, {"magnitude_only": ["up_proj"]},
                                    {"method": "dvora"}, {"rank_overrides": {"q_proj": 2}}])  # fmt: skip
def test_the_file_says_it_all(config, tmp_path, tiny_folder):
    model = adapter(tiny_folder, tmp_path, **config)
    export = export_scaled(str(tiny_folder), tmp_path / "adapter", tmp_path / "out")
    with torch.no_grad():
        expected, found = model(IDS).logits, through_the_file(tiny_folder, tmp_path / "out")(IDS).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert export.layers == len(list(doratune.adapters(model)))


def test_zero_rows_have_the_scale_one(tmp_path, tiny_folder, tiny_tokenizer):
    def empty(model):
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[3] = 0

    model = adapter(tiny_folder, tmp_path, empty)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    empty(base)
    base.save_pretrained(tmp_path / "base")
    export_scaled(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    with safe_open(tmp_path / "out" / "lora_scale.safetensors", "pt") as file:
        scale = file.get_tensor("model.layers.0.self_attn.q_proj.output_scale")
    assert scale[3] == 1 and (scale != 1).sum() == len(scale) - 1
    with torch.no_grad():
        assert torch.allclose(through_the_file(tmp_path / "base", tmp_path / "out")(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"magnitude_axis": "input"}, "input axis"),
        ({"targets": ["embed_tokens"]}, "embedding"),
        ({"also_train": ["lm_head"]}, "trained whole"),
    ],
)
def test_what_it_cannot_say_is_refused(config, reason, tmp_path, tiny_folder, capsys):
    adapter(tiny_folder, tmp_path, **config)
    words = ["--to", "lora-scale", "--model", str(tiny_folder), "--adapter", str(tmp_path / "adapter")]
    assert main(["export", *words, "--output", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=reason):
        export_scaled(str(tiny_folder), tmp_path / "adapter", tmp_path / "out")
