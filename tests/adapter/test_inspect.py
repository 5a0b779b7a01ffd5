"""`doratune inspect` and `inspect(model)`: the table before training."""

import json

import pytest
import torch
from conftest import tiny_llama

import doratune
from doratune.cli.main import main


def test_the_table_counts_what_is_there():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3:5] = 0.0
        model.model.layers[1].self_attn.q_proj.weight[7] *= 1e-4
    config = doratune.AdapterConfig(
        rank=4, targets=["q_proj", "v_proj"], exclude=["layers.1.self_attn.v_proj"], magnitude_only=["o_proj"]
    )
    found = doratune.inspect(doratune.attach(model, config))
    rows = {row.module.removeprefix("model.layers."): row for row in found.rows}
    assert set(rows) == {
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
        "1.self_attn.q_proj",
        "0.self_attn.o_proj",
        "1.self_attn.o_proj",
    }
    assert (rows["0.self_attn.q_proj"].zero, rows["0.self_attn.q_proj"].near_zero) == (2, 0)
    assert (rows["1.self_attn.q_proj"].zero, rows["1.self_attn.q_proj"].near_zero) == (0, 1)
    assert (rows["0.self_attn.o_proj"].rank, rows["0.self_attn.o_proj"].direction, rows["0.self_attn.o_proj"].trainable) == (
        0,
        "none",
        32,
    )
    assert rows["0.self_attn.v_proj"].trainable == 4 * (32 + 16) + 16
    assert found.trainable == sum(row.trainable for row in found.rows)
    assert found.left_out == {"model.layers.1.self_attn.v_proj": "excluded"}
    table = found.table()
    assert "left out: model.layers.1.self_attn.v_proj: excluded" in table
    assert "2 rows without direction" in table and "1 near zero" in table


def test_from_the_command_line(tiny_folder, capsys, tmp_path):
    assert main(["inspect", "--model", str(tiny_folder), "--method", "dvora", "--rank", "64", "--dtype", "float32", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert {row["direction"] for row in found["rows"]} == {"vera"} and found["left_out"]["lm_head"] == "output head"
    assert found["trainable"] == sum(2 * row["shape"][0] + 64 for row in found["rows"])
    model = doratune.attach(tiny_llama(), doratune.AdapterConfig(method="lora", rank=2, targets=["q_proj"]))
    doratune.save(model, tmp_path)
    assert main(["inspect", "--model", str(tiny_folder), "--adapter", str(tmp_path), "--json"]) == 0
    assert {row["magnitude"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]} == {"none"}


def test_names_with_commas_are_a_list(tiny_folder, capsys):
    for words in (["q_proj,v_proj"], ["[q_proj, v_proj]"]):
        assert main(["inspect", "--model", str(tiny_folder), "--rank", "4", "--targets", *words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert {row["module"].split(".")[-1] for row in found["rows"]} == {"q_proj", "v_proj"}
    assert main(["inspect", "--model", str(tiny_folder), "--rank", "4", "--targets", ".*[qk]_proj", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither model nor adapter"),
        (["--model", "TINY", "--targets", "qproj"], "did you mean 'q_proj'"),
        (["--model", "TINY", "--rank", "999"], "rank 999 is larger than its smaller side"),
        (["--model", "TINY", "--quantize", "nf5"], "quantize is 'nf5'; expected one of none, nf4, fp4, int8; did you mean 'nf4'"),
        (["--model", "TINY", "--rank", "abc"], "rank is 'abc'; expected a whole number"),
        (["--model", "TINY", "--method", "dorra"], "did you mean 'dora'"),
        (["--model", "TINY", "--targets", "all-leyers"], "did you mean 'all-layers'"),
        (["--adapter", "somewhere", "--rank", "3"], "rank: with --adapter the folder says it"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tiny_folder, capsys):
    assert main(["inspect", *(str(tiny_folder) if a == "TINY" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


PAPER_7B = {  # method, rank, targets: per cent (Tables 1, 5 and 6)
    ("lora", 32, "qkvud"): 0.83,
    ("dora", 32, "qkvud"): 0.84,
    ("dora", 16, "qkvud"): 0.43,
    ("vera", 256, "all"): 0.02,
    ("dvora", 256, "all"): 0.04,
    ("vera", 1024, "all"): 0.02,
    ("dvora", 1024, "all"): 0.04,
}


@pytest.mark.parametrize("key", PAPER_7B)
def test_the_papers_parameter_shares_by_counting(key):
    from transformers import LlamaConfig, LlamaForCausalLM

    from doratune.adapter.inspect import count

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # its defaults are LLaMA-7B
    method, rank, names = key
    targets = "all-linear" if names == "all" else ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    trainable, own = count(model, doratune.AdapterConfig(method=method, rank=rank, targets=targets))
    assert own == 6_738_415_616
    assert 100 * trainable / (own + trainable) == pytest.approx(PAPER_7B[key], abs=0.005)


def test_counting_is_what_attach_trains():
    for method in ("dora", "dvora", "dloha", "dlokr"):
        config = doratune.AdapterConfig(method=method, rank=4, also_train=["lm_head"])
        from doratune.adapter.inspect import count

        expected = count(tiny_llama(), config)[0]
        model = doratune.attach(tiny_llama(), config)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
