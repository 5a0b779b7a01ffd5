"""Which runs load a base in parts, and what those say that load it whole. No process is started: this is decided before."""

import json

import pytest
import torch
from conftest import tiny_gpt2
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from doratune.training.base_blocks import base_blocks
from doratune.training.objectives import objective_of
from doratune.training.recipe import TrainRecipe

WHOLE = "each process holds all of the base until it is divided: "


def decided(folder, **settings):
    """(blocks, lines said) of a recipe."""
    recipe = TrainRecipe(**({"model": str(folder), "data": "-", "fsdp": "shard", "rank": 2, "targets": "all-linear"} | settings))
    said = []
    return base_blocks(recipe, objective_of(recipe), said.append), said


def test_blocks_and_an_embedding_of_its_own(tiny_folder):
    blocks, said = decided(tiny_folder)
    assert set(blocks) == {"model.layers.*", "model.embed_tokens"}
    assert said == ["each process loads its own part of the base alone"]


def test_an_embedding_that_the_head_shares_lies_with_the_rest(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    assert set(decided(tmp_path)[0]) == {"transformer.h.*"}


REASONS = {
    "packed": ({"quantize": "nf4"}, "quantize is 'nf4', which packs whole weights"),
    "another start": ({"start": "pissa"}, "start is 'pissa'"),
    "trained whole": ({"also_train": ("lm_head",)}, "lm_head: trained whole"),
    "another objective": ({"objective": "image_classification"}, "objective is 'image_classification'"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_needs_whole_weights_says_so(name, tiny_folder):
    settings, reason = REASONS[name]
    blocks, (line,) = decided(tiny_folder, **settings)
    assert blocks is None and line.startswith(WHOLE + reason) and "\n" not in line


def test_adapted_experts_are_loaded_whole_and_experts_beside_the_adapter_in_parts(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=1, head_dim=8, num_experts_per_tok=2, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert decided(tmp_path, targets=["q_proj"])[0]
    blocks, (line,) = decided(tmp_path, targets=["gate_up_proj", "q_proj"])
    assert blocks is None and line == WHOLE + "the forward of its experts is tried with whole weights"


def test_a_base_that_is_quantized_already(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    (tmp_path / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
    blocks, (line,) = decided(tmp_path)
    assert blocks is None and line == WHOLE + "it is quantized, and packed weights are read whole"


def test_a_base_without_safetensors(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    torch.save(load_file(tiny_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    blocks, (line,) = decided(tmp_path)
    assert blocks is None and line.startswith(WHOLE + "it is stored without safetensors")


def test_accelerate_s_own_configuration(tiny_folder, monkeypatch):
    assert decided(tiny_folder, fsdp="none") == (None, [])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    blocks, (line,) = decided(tiny_folder, fsdp="none")
    assert blocks is None and line == WHOLE + "accelerate's configuration divides it afterwards; fsdp: shard loads it in parts"


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is one place alone")
@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"fsdp": "offload"}])
def test_parts_that_lie_elsewhere_than_transformers_puts_them(settings, tiny_folder):
    assert decided(tiny_folder, **settings)[0] is None
