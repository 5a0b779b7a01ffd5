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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither model nor adapter"),
        (["--model", "TINY", "--targets", "qproj"], "did you mean 'q_proj'"),
        (["--model", "TINY", "--rank", "999"], "rank 999 is larger than its smaller side"),
        (["--model", "TINY", "--quantize", "nf5"], "nf5"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tiny_folder, capsys):
    assert main(["inspect", *(str(tiny_folder) if a == "TINY" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
