"""Families of transformers, each through the whole path (`sweep.py`): some of unlike kinds, or all with DORATUNE_LONG=1."""

import os

import pytest
from sweep import classes, run, sweep

SOME = {
    "llama": "LlamaForCausalLM",
    "bert": "BertForSequenceClassification",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "wav2vec2": "Wav2Vec2ForCTC",
    "mixtral": "MixtralForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "mamba": "MambaForCausalLM",
}
PASSED_BY = {"wavlm": "WavLMForSequenceClassification"}


@pytest.mark.parametrize("family", SOME)
def test_the_whole_path(family, tmp_path):
    result = run(family, SOME[family], tmp_path)
    assert result.ok, f"{result.stage}: {result.reason}"
    assert result.layers == result.moved + len(result.named)
    assert result.moved > 0


@pytest.mark.parametrize("family", PASSED_BY)
def test_layers_that_are_passed_by_are_named(family, tmp_path):
    result = run(family, PASSED_BY[family], tmp_path)
    assert result.ok, f"{result.stage}: {result.reason}"
    assert sum("read by" in why for why in result.named.values()) == 8


@pytest.mark.skipif(not os.environ.get("DORATUNE_LONG"), reason="some minutes; set DORATUNE_LONG=1")
def test_every_family():
    results = sweep(classes())
    assert [f"{r.name}: {r.stage}: {r.reason}" for r in results if not r.ok and not r.exception] == []
    assert sum(r.ok for r in results) >= 250
    assert all(r.reason for r in results if r.exception)
