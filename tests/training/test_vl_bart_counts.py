"""VL-BART's trained shares by counting BART-base on the meta device, beside the paper's (Tables 2 and 3)."""

import dataclasses
from pathlib import Path

import torch
import transformers
import yaml

from doratune.adapter.targets import select
from doratune.support.vl_bart import VISUAL, VisualInput, VLBartForConditionalGeneration
from doratune.training.recipe import TrainRecipe
from doratune.training.visual import visual_config

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BASE = {"vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072} | {
    "decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12}  # fmt: skip


def counted(recipe, size, places, method):
    """(BART-base, numbers of the adapter, modules that are trained whole) as a recipe says, on the meta device."""
    config = transformers.BartConfig(**BASE)
    config.visual = dataclasses.asdict(VisualInput(size=size, places=places))
    with torch.device("meta"):
        model = VLBartForConditionalGeneration(config)
    settings = TrainRecipe(**yaml.safe_load((RECIPES / recipe).read_text()) | {"method": method})
    selection = select(model, visual_config(settings.adapter(), settings.visual(), model))
    layers = [(rank, model.get_submodule(name)) for name, rank in selection.ranks.items()]
    assert len(layers) == 36 and all(name.endswith(("q_proj", "v_proj")) for name in selection.ranks)
    low_rank = sum(rank * (layer.in_features + layer.out_features) for rank, layer in layers)
    return model, low_rank + (method == "dora") * sum(layer.out_features for _, layer in layers), selection.also_train


def numbers(model, keep):
    return sum(p.numel() for name, p in model.named_parameters() if keep(name))


def published_share(model, adapter, norms):
    """The share with what the published program has and we do not: a projection of boxes (5 numbers, with a layer norm) instead of
    places, all biases, 200 tokens more; norms: are weights of layer norms trained?"""
    places, boxes = numbers(model, lambda name: name == f"{VISUAL}.places.weight"), 5 * 768 + 3 * 768
    visual = numbers(model, lambda name: name.startswith(VISUAL)) - places + boxes
    biases = numbers(model, lambda name: VISUAL not in name and name.endswith("bias"))
    weights = numbers(model, lambda name: VISUAL not in name and "norm" in name and name.endswith("weight"))
    total = numbers(model, lambda name: True) - places + boxes + 200 * 768 + adapter
    return 100 * (adapter + visual + biases + norms * weights) / total


def test_bart_base_by_counting():
    for recipe, size, places, method, said, ours, norms in (
        ("vlbart_image.yaml", 2048, 36, "lora", 5.93, 5.90, False),
        ("vlbart_image.yaml", 2048, 36, "dora", 5.96, 5.91, True),
        ("vlbart_video.yaml", 512, 64, "lora", 5.17, 5.12, False),
        ("vlbart_video.yaml", 512, 64, "dora", 5.19, 5.14, False),
    ):
        model, adapter, whole = counted(recipe, size, places, method)
        trained = adapter + sum(p.numel() for name in whole for p in model.get_submodule(name).parameters())
        share = 100 * trained / (numbers(model, lambda name: True) + adapter)
        assert round(published_share(model, adapter, norms), 2) == said, (recipe, method)
        assert round(share, 2) == ours, (recipe, method, trained, share)
