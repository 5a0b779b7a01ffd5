"""What a new user gives wrongly, over all commands: one line that names it, exit status 2, nothing written."""

import json

import pytest

from doratune.cli.main import main

WRONG = [
    ("train --config", "--config has no value"),
    ("train --sample_prompts --rank 2", "--sample_prompts has no value"),
    ("train --targets", "--targets has no value"),
    ("report --modules", "--modules has no value"),
    ("train --model MODEL --data d.jsonl --output EMPTY", "output is empty; give --output VALUE, or leave it out for runs/train"),
    ("train --model EMPTY --data d.jsonl", "model is empty"),
    ("init d.jsonl --model MODEL --output EMPTY", "output is empty"),
    ("evaluate --model MODEL --task d.jsonl --output EMPTY", "output is empty"),
    ("train d.jsonl --model MODEL", "d.jsonl is a file of data, where a recipe is expected; give --data d.jsonl"),
    ("plan t.csv --model MODEL", "t.csv is a file of data, where a recipe is expected"),
    ("train --config d.jsonl --model MODEL", "d.jsonl is a file of data, where a recipe is expected"),
    ("evaluate --model MODEL --task folder", "folder: a folder, where one data file is expected"),
    ("generate --model MODEL --prompts folder", "folder: a folder, where one file of prompts is expected"),
    ("train --model MODEL --data d.jsonl --tasks folder --output run", "folder: a folder, where one data file is expected"),
    ("runs d.jsonl", "d.jsonl: a file, where a folder is expected"),
    ("report d.jsonl", "d.jsonl: a file, where a folder is expected"),
    ("push --folder d.jsonl --to me/x", "d.jsonl: a file, where a folder is expected"),
    ("data d.jsonl --model MODEL --fix t.csv/x.jsonl", "t.csv is a file); give another place"),
    ("init d.jsonl --model MODEL --output t.csv/x.yaml --memory 2 --device cpu", "t.csv is a file); give another place"),
    ("doctor --jsn", "--jsn; doratune doctor --help shows what there is"),
    ("extract --model MODEL --tuned folder --output adapter", "folder has no config.json"),
]


@pytest.mark.parametrize(("command", "line"), WRONG, ids=[command for command, _ in WRONG])
def test_it_is_one_line(command, line, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"instruction": "Is 2 even?", "output": "it is true"}) + "\n"
    (tmp_path / "d.jsonl").write_text(row)
    (tmp_path / "t.csv").write_text("instruction,output\na,b\n")
    (tmp_path / "folder").mkdir()
    capsys.readouterr()
    words = {"MODEL": str(tiny_folder), "EMPTY": ""}
    assert main([words.get(word, word) for word in command.split()]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"doratune {command.split()[0]}: ") and line in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "folder", "t.csv"]
    assert (tmp_path / "d.jsonl").read_text() == row
