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
    ("train --learning_rate 1e-3", "unknown setting --learning_rate; learning_rate is lr here"),
    ("train --per-device-train-batch-size 4", "per_device_train_batch_size is batch_size here"),
    ("init d.jsonl --model_name_or_path MODEL", "model_name_or_path is model here"),
    ("merge --adapter_name_or_path x", "adapter_name_or_path is adapter here"),
    ("inspect --model MODEL --lora_r 4", "lora_r is rank here"),
    ("generate --max_length 4 --prompt x", "max_length is max_new_tokens here"),
    ("train --lora_rnk 4", "unknown setting --lora_rnk; did you mean 'rank'"),
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


def test_names_of_other_programs_lead_to_settings_that_are_there():
    """Each of ours is a setting of a command; no name of theirs stands for two of them at one command."""
    import dataclasses

    from doratune.cli.description import described
    from doratune.cli.main import COMMANDS
    from doratune.cli.other_names import OURS, instead

    lines = [described(command) for command in COMMANDS]
    settings = [{field.name for field in dataclasses.fields(line.settings)} for line in lines if line.settings]
    assert set(OURS) <= set().union(*settings)
    for known in settings:
        theirs = [name for ours in OURS.keys() & known for name in OURS[ours].split()]
        assert len(theirs) == len(set(theirs))
        for ours in OURS.keys() & known:
            for name in set(OURS[ours].split()) - known:
                assert instead(name, known) == f"; {name} is {ours} here"


def test_a_recipe_of_another_program(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.yaml").write_text("model_name_or_path: x\ncutoff_len: 1024\n")
    assert main(["train", "theirs.yaml"]) == 2
    assert "theirs.yaml: unknown setting 'model_name_or_path'; model_name_or_path is model here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["q_proj", "self_attn.q_proj", "layers.1.mlp.up_proj", "lm_head"])
@pytest.mark.parametrize("setting", ["targets", "exclude", "magnitude_only", "also_train"])
def test_a_name_without_a_list_is_a_name(setting, name, tiny_folder, tmp_path, monkeypatch, capsys):
    """As a flag and in a recipe; a regular expression is one still, and a misspelling has its near miss."""
    monkeypatch.chdir(tmp_path)
    words = ["inspect", "--model", str(tiny_folder), "--json", "--rank", "2"]
    words += [] if setting in ("targets", "exclude") else ["--targets", "k_proj"]

    def report(*more):
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert report(f"--{setting}", name) == report(f"--{setting}", f"[{name}]")
    if setting == "targets" and name != "lm_head":
        assert report("--targets", f".*{name}") == report("--targets", f"[{name}]")
        assert main([*words, "--targets", name.replace("pr", "r")]) == 2
        assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("files", [["a.jsonl"], ["a.jsonl", "b.jsonl"]])
@pytest.mark.parametrize("command", ["data", "train --bad_items skip --data"])
def test_files_are_named_as_they_were_given(files, command, tiny_folder, tmp_path, monkeypatch, capsys):
    """Not as a list of Python's."""
    monkeypatch.chdir(tmp_path)
    for name in files:
        (tmp_path / name).write_text(json.dumps({"instruction": "x", "output": ""}) + "\n")
    assert main([*command.split(), *files, "--model", str(tiny_folder)]) == 2
    line = capsys.readouterr().err
    assert "holds no item that can be used; the first: a.jsonl: item 1" in line and "['" not in line
