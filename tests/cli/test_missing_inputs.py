"""Several inputs that are not there are named in one line; one is said by its reader. Words behind `--data` are a list."""

import json

import pytest

from doratune.cli.main import main

GRID = "settings: {data: no_a.jsonl, eval_data: no_b.jsonl, tasks: [no_c.json]}\nmethod_lrs: {dora: [1.0e-3]}\nmethods: [dora]\n"
RECIPE = "data: no_a.jsonl\neval_data: no_b.jsonl\ntasks: [no_c.json]\noutput: run\n"
SEVERAL = [
    ("train recipe.yaml --model MODEL", "data no_a.jsonl, eval_data no_b.jsonl, tasks no_c.json"),
    ("train --model MODEL --data no_a.jsonl no_b.csv.gz here.jsonl --output run", "data no_a.jsonl, data no_b.csv.gz"),
    ("train --model MODEL --data no_a.jsonl[:20] --eval_data ./no --output run", "data no_a.jsonl, eval_data ./no"),
    ("compare grid.yaml --output grid", "data no_a.jsonl, eval_data no_b.jsonl, tasks no_c.json"),
    ("data no_a.jsonl here.jsonl --model MODEL --test no_b.parquet", "data no_a.jsonl, test no_b.parquet"),
    ("init no_a.jsonl no_b.jsonl --model MODEL", "data no_a.jsonl, data no_b.jsonl"),
    ("evaluate --adapter none --task no_a.json boolq no_b.jsonl", "task no_a.json, task no_b.jsonl, adapter none"),
    ("generate --prompts no_a.jsonl --adapter none", "prompts no_a.jsonl, adapter none"),
    ("chat --adapter none --adapter x=nothing", "adapter none, adapter nothing"),
    ("serve --adapter none nothing", "adapter none, adapter nothing"),
    ("report none nothing", "runs none, runs nothing"),
    ("analyze none nothing --gradient_data no_a.jsonl", "gradient_data no_a.jsonl, runs none, runs nothing"),
]
ONE = [
    ("train --model MODEL --data here.jsonl --eval_data no_b.jsonl --output run", "no_b.jsonl: no such data file"),
    ("data here.jsonl --model MODEL --test no_b.jsonl", "no_b.jsonl: no such data file"),
    ("evaluate --adapter none --task here.jsonl", "none is not a folder; expected an adapter folder"),
    ("report none", "none: no such folder"),
]


@pytest.fixture
def said(tiny_folder, tmp_path, monkeypatch, capsys):
    """said(command) → its one line on standard error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "here.jsonl").write_text(json.dumps({"instruction": "Is 2 even?", "output": "it is true"}) + "\n")
    before = sorted(path.name for path in tmp_path.iterdir())

    def line(command):
        capsys.readouterr()
        assert main(command.replace("MODEL", str(tiny_folder)).split()) == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        return errors[0]

    return line


@pytest.mark.parametrize(("command", "names"), SEVERAL, ids=[command for command, _ in SEVERAL])
def test_all_of_them_are_named(command, names, said):
    assert said(command) == f"doratune {command.split()[0]}: no such files: {names}; check their paths"


@pytest.mark.parametrize(("command", "line"), ONE, ids=[command for command, _ in ONE])
def test_one_is_said_by_its_reader(command, line, said):
    assert line in said(command)


def test_words_behind_a_flag_that_takes_one_or_several(tiny_folder, tmp_path, monkeypatch):
    """Also what a shell makes of `parts/*.jsonl`, and names that are not YAML's."""
    monkeypatch.chdir(tmp_path)
    for name in ("a b", "null", "[c]"):
        row = json.dumps({"instruction": f"Is {name} even?", "output": "it is true"})
        (tmp_path / f"{name}.jsonl").write_text(row + "\n" + row + "\n")
    words = ["train", "--model", str(tiny_folder), "--data", "a b.jsonl", "null.jsonl", "[c].jsonl", "--output", "run"]
    words += ["--targets", "q_proj", "v_proj", "--rank", "2", "--dtype", "float32", "--max_steps", "1", "--tensorboard", "false"]
    assert main(words) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert metrics["examples"] == 6 and sorted(config["target_modules"]) == ["q_proj", "v_proj"]
