"""QDoRA (§6.1) from the command line's parts: train on a quantized base, save, load, merge three ways. bitsandbytes on the CPU."""

import json

import pytest
import torch

import doratune
from doratune.checkpoint.logits import distance
from doratune.checkpoint.quantized import merge_quantized
from doratune.cli.main import main
from doratune.errors import UserError
from doratune.support.models import load_model
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train

pytest.importorskip("bitsandbytes")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, tiny_tokenizer):
    """A Llama whose rows are whole blocks of 64 numbers: bitsandbytes' CPU kernels misread others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    tokens = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    folder = tmp_path_factory.mktemp("tiny_64")
    LlamaForCausalLM(LlamaConfig(**shape, **tokens, max_position_embeddings=256)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.json"
    rows = [
        {"instruction": f"is {i} even?", "input": "", "output": f"the correct answer is {str(i % 2 == 0).lower()}"}
        for i in range(24)
    ]
    path.write_text(json.dumps(rows))
    return path


def recipe(tiny_folder, data, output, **settings):
    common = {"model": str(tiny_folder), "data": str(data), "output": str(output), "rank": 4, "dtype": "float32", "quantize": "nf4"}
    return TrainRecipe(**common | {"lr": 5e-3, "max_steps": 12, "batch_size": 4, "log_steps": 1, "tensorboard": False} | settings)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "settings",
    [{}, {"quantize": "fp4", "double_quantization": True}, {"method": "lora"}, {"method": "dvora", "rank": 32, "lr": 0.1}],
)
def test_the_loss_falls_and_the_adapter_comes_back(settings, tiny_folder, data, tmp_path):
    metrics = train(recipe(tiny_folder, data, tmp_path / "run", **settings), say=lambda _: None)
    losses = [row["loss"] for row in metrics["log"] if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.1
    recorded = json.loads((tmp_path / "run/adapter/doratune.json").read_text())["quantization"]
    assert recorded["bnb_4bit_quant_type"] == settings.get("quantize", "nf4")
    quantized = load_model(str(tiny_folder), "float32", settings.get("quantize", "nf4"), settings.get("double_quantization", False))
    base = logits(quantized)
    doratune.load(quantized, tmp_path / "run/adapter")
    assert distance(logits(quantized), base) > 1e-3
    assert {layer.adapted.base.name for _, layer in doratune.adapters(quantized)} == {"bitsandbytes 4 bit"}


def test_a_run_that_was_interrupted_goes_on(tiny_folder, data, tmp_path):
    whole = train(recipe(tiny_folder, data, tmp_path / "whole", save_steps=6, schedule="constant"), say=lambda _: None)
    part = recipe(tiny_folder, data, tmp_path / "part", save_steps=6, schedule="constant")
    train(recipe(tiny_folder, data, tmp_path / "part", save_steps=6, schedule="constant", max_steps=6), say=lambda _: None)
    part.resume = True
    resumed = train(part, say=lambda _: None)
    assert resumed["steps"] == whole["steps"] == 12


def test_resuming_with_another_base_is_refused(tiny_folder, data, tmp_path):
    train(recipe(tiny_folder, data, tmp_path / "run", save_steps=2, max_steps=2), say=lambda _: None)
    for settings, message in (({"quantize": "none"}, "quantize 'nf4' -> 'none'"), ({"rank": 8}, "rank 4 -> 8")):
        with pytest.raises(UserError, match=message):
            train(recipe(tiny_folder, data, tmp_path / "run", max_steps=4, resume=True, **settings), say=lambda _: None)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_merged_three_ways(targets, tiny_folder, data, tmp_path, capsys):
    train(recipe(tiny_folder, data, tmp_path / "run", targets=targets), say=lambda _: None)
    adapter, errors = tmp_path / "run/adapter", {}
    model = doratune.load(load_model(str(tiny_folder), "float32", "nf4"), adapter)
    trained = logits(model)
    for into in ("dequantized", "original", "same"):
        difference = merge_quantized(str(tiny_folder), adapter, tmp_path / into, into, "float32")
        errors[into] = difference.error
        again = load_model(str(tmp_path / into), "float32")
        quantized = any("4bit" in type(m).__name__ for m in again.modules())
        assert quantized == (into == "same")
        assert distance(logits(again), trained) < 2 * difference.error + 1e-5  # on other tokens
    # a layer that is not adapted is repacked by bitsandbytes in evaluation, and rounds otherwise than its dequantized weight
    assert errors["dequantized"] < (1e-5 if targets == "all-linear" else 0.02)
    assert 0.02 < errors["original"] < 0.5 and 1e-4 < errors["same"] < 0.5
    assert main(["merge", "--model", str(tiny_folder), "--adapter", str(adapter), "--output", str(tmp_path / "cli"), "--json"]) == 0
    out = capsys.readouterr().out
    assert "logits differ from the quantized base + adapter" in out and json.loads(out.splitlines()[-1])["into"] == "dequantized"


def test_loftq_and_the_original_magnitude_from_a_recipe(tiny_folder, data, tmp_path):
    lines = []
    train(recipe(tiny_folder, data, tmp_path / "a", magnitude_from="original", max_steps=2), say=lines.append)
    assert any("|m/n - 1|" in line for line in lines)
    original, plain = load_model(str(tiny_folder), "float32"), load_model(str(tiny_folder), "float32", "nf4")
    loftq = load_model(str(tiny_folder), "float32", "nf4")
    doratune.attach(loftq, doratune.AdapterConfig(rank=8, start="loftq"), original=original)
    assert distance(logits(loftq), logits(original)) < distance(logits(plain), logits(original))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "none", "start": "loftq"}, "is for a quantized base; set quantize: nf4"),
        ({"quantize": "none", "magnitude_from": "original"}, "is for a quantized base"),
    ],
)
def test_settings_that_need_a_quantized_base(settings, message, tiny_folder, data, tmp_path):
    with pytest.raises(UserError, match=message):
        train(recipe(tiny_folder, data, tmp_path / "run", **settings), say=lambda _: None)


def test_a_missing_quantizer_names_its_extra(tiny_folder, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a))
    with pytest.raises(UserError, match=r"pip install 'doratune\[quantized\]'"):
        load_model(str(tiny_folder), "float32", "nf4")


def test_an_adapter_of_a_dense_base_has_nothing_to_dequantize(tiny_folder, tmp_path, capsys):
    model = doratune.attach(load_model(str(tiny_folder)), doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    doratune.save(model, tmp_path / "adapter")
    arguments = ["--model", str(tiny_folder), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    assert main(["merge", *arguments, "--into", "same"]) == 2
    assert "not quantized" in capsys.readouterr().err and not (tmp_path / "out").exists()
