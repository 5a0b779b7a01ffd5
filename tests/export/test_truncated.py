"""Truncated SVD: the residual that is printed is the one that is measured, PEFT loads the folder, the error asked for is kept."""

import json

import pytest
import torch
from conftest import randomize, tiny_gpt2
from transformers import AutoModelForCausalLM

import doratune
from doratune import UserError
from doratune.cli.main import main
from doratune.export.truncated import export_truncated, smallest_rank

TARGETS = {"tiny": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.fixture(params=["tiny", "gpt2", "input axis", "magnitude only"])
def adapted(request, tmp_path, tiny_folder, tiny_tokenizer):
    """(base folder, adapter folder, {layer: (W, W')} taken from the model in memory)."""
    base = tiny_folder
    if request.param == "gpt2":
        base = tmp_path / "base"
        tiny_gpt2().save_pretrained(base)
        tiny_tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"rank": 3, "targets": TARGETS.get(request.param, TARGETS["tiny"])}
    settings |= {"magnitude_axis": "input"} if request.param == "input axis" else {}
    settings |= {"magnitude_only": ["up_proj"]} if request.param == "magnitude only" else {}
    doratune.attach(model, doratune.AdapterConfig(**settings))
    doratune.save(randomize(model), tmp_path / "adapter")
    before = {name: layer.weight.detach().clone() for name, layer in doratune.adapters(model)}
    doratune.merge(model)
    pairs = {name: (W, model.get_submodule(name).weight.detach()) for name, W in before.items()}
    return base, tmp_path / "adapter", pairs


def measured(base, folder, pairs) -> tuple[dict[str, float], float]:
    """Residuals by loading the folder in PEFT and merging it there."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    missing = {name: (model.get_submodule(name).weight.detach() - merged).norm() for name, (_, merged) in pairs.items()}
    norms = {name: (merged - W).norm() for name, (W, merged) in pairs.items()}
    total = (sum(m**2 for m in missing.values()) / sum(n**2 for n in norms.values())) ** 0.5
    return {name: (missing[name] / norms[name]).item() for name in pairs}, total.item()


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_printed_residual_is_the_measured_one(rank, adapted, tmp_path, capsys):
    base, adapter, pairs = adapted
    words = ["--to", "lora", "--model", str(base), "--adapter", str(adapter), "--rank", str(rank), "--json"]
    assert main(["export", *words, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    layers, total = measured(base, tmp_path / "out", pairs)
    assert set(result["layers"]) == set(pairs)
    for name, residual in layers.items():
        assert result["layers"][name]["residual"] == pytest.approx(residual, rel=1e-3, abs=2e-6)
        assert any(line.split()[0] == name and line.split()[-1] == f"{residual:.4f}" for line in printed.splitlines() if line)
    assert result["residual"] == pytest.approx(total, rel=1e-3, abs=2e-6)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is False


def test_the_smallest_rank_for_an_error(adapted, tmp_path):
    base, adapter, pairs = adapted
    export = export_truncated(str(base), adapter, tmp_path / "out", error=0.2)
    layers, _ = measured(base, tmp_path / "out", pairs)
    for name, (W, merged) in pairs.items():
        S = torch.linalg.svdvals((merged - W).double())
        rank = export.layers[name].rank
        assert layers[name] <= 0.2 * (1 + 1e-4)
        assert rank == 1 or (S[rank - 1 :].norm() / S.norm()) > 0.2  # one fewer would not do


def test_full_rank_is_exact_and_ours_load_it(tmp_path, tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    doratune.attach(model, doratune.AdapterConfig(rank=3, targets=["q_proj", "down_proj"]))
    doratune.save(randomize(model), tmp_path / "adapter")
    export = export_truncated(str(tiny_folder), tmp_path / "adapter", tmp_path / "out", rank=1000)
    assert export.relative < 1e-5 and {r.rank for r in export.layers.values()} == {32}
    back = doratune.load(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(back(ids).logits, model(ids).logits, atol=1e-4)


def test_smallest_rank_by_hand():
    S = torch.tensor([4.0, 2.0, 1.0, 0.0])
    total = 21**0.5
    assert [smallest_rank(S, e) for e in (0.99, 5**0.5 / total + 1e-6, 5**0.5 / total - 1e-6, 0.01)] == [1, 1, 2, 3]
    assert smallest_rank(torch.zeros(3), 0.1) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "give one of"), ({"rank": 2, "error": 0.1}, "give one of"), ({"rank": 0}, "rank is 0"), ({"error": 1.5}, "error is 1.5"),
     ({"error": float("nan")}, "error is nan")],
)  # fmt: skip
def test_bad_settings(settings, words, adapted, tmp_path):
    base, adapter, _ = adapted
    with pytest.raises(UserError, match=words):
        export_truncated(str(base), adapter, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"targets": ["embed_tokens"]}, {"also_train": ["lm_head"]}])
def test_what_plain_lora_has_no_place_for(setting, tmp_path, tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    doratune.attach(model, doratune.AdapterConfig(**{"rank": 3, "targets": ["q_proj"]} | setting))
    doratune.save(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="merge it instead"):
        export_truncated(str(tiny_folder), tmp_path / "adapter", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
