"""Standard error holds what doratune says; what other packages tell their own developers while they load is left out."""

import json
import os
import re
import subprocess
import sys

import pytest

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def errors(folder, *words, options=()):
    command = [sys.executable, *options, "-m", "doratune", *words]
    run = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    return run.returncode, run.stderr.splitlines()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["train", "--data", "no_such_file.json"], 2),
        (["compare"], 2),
        (["demo", "--help"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_only_our_own_line(words, status, tmp_path):
    """Each of these loads everything that training needs."""
    found, lines = errors(tmp_path, *words)
    assert found == status
    assert len(lines) == bool(status) and all(line.startswith(f"doratune {words[0]}: ") for line in lines), lines


COMMANDS = """
from doratune.cli.main import main, quiet_others
quiet_others()
small = ["--model", MODEL, "--batch_size", "4", "--dtype", "float32"]
train = ["train", "--data", "items.json", *small, "--max_steps", "2", "--save_steps", "1", "--tensorboard", "false"]
print([
    main(["init", "items.json", "--model", MODEL, "--memory", "0.1", "--device", "cpu"]),
    main([*train, "--output", "full", "--method", "full", "--checkpointing", "reentrant"]),
    main([*train, "--output", "run", "--rank", "2", "--checkpointing", "non-reentrant"]),
    main(["generate", "--adapter", "run/adapter", "--prompt", "Is 2 even?", "--max_new_tokens", "2", "--temperature", "1"]),
    main(["merge", "--adapter", "run/adapter", "--output", "merged"]),
    main(["export", "--adapter", "run/adapter", "--to", "lora", "--rank", "2", "--output", "lora"]),
    main(["data", "items.json", "--model", "merged", "--max_length", "4"]),
])
"""


def test_bars_and_lines_of_a_way_through_the_commands_are_ours(tmp_path, tiny_folder):
    """Also where they use what other packages warn of: gradient checkpointing, sampling, a saved model in one file."""
    items = [{"instruction": f"Is {i} even?", "input": "", "output": "true"} for i in range(12)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    command = [sys.executable, "-c", COMMANDS.replace("MODEL", repr(str(tiny_folder)))]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert run.stdout.splitlines()[-1] == "[2, 0, 0, 0, 0, 0, 0]", run.stdout[-2000:] + run.stderr[-2000:]
    pieces = [piece.replace("\x1b[A", "").strip() for piece in re.split(r"[\r\n]", run.stderr)]
    ours = re.compile(r"doratune init: memory is |(merging|layers|default|run|ΔM and ΔD|.*answers?)?:? *\d+%\|")
    assert [piece for piece in pieces if piece and not ours.match(piece)] == []


def test_who_asks_for_warnings_gets_them(tmp_path):
    code = "import warnings; from doratune.cli.main import quiet_others; quiet_others(); warnings.warn('mine', FutureWarning)"
    for options, shown in (((), False), (("-W", "always"), True)):
        run = subprocess.run([sys.executable, *options, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0 and ("mine" in run.stderr) == shown


def test_settings_are_said_once_and_only_those_that_were_chosen(tmp_path, tiny_folder, capsys, monkeypatch):
    """An error in the data stands below a few lines, not below all the settings that there are."""
    import yaml

    from doratune.cli.main import main

    monkeypatch.chdir(tmp_path)
    chosen = ["--model", str(tiny_folder), "--rank", "3", "--targets", "[q_proj]", "--lr", "0.002"]
    assert main(["train", "--data", "no_such_file.json", *chosen]) == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= 8 and any("the other" in line and "recipe.yaml" in line for line in said)
    items = [{"instruction": f"Is {i} even?", "input": "", "output": "true"} for i in range(4)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    assert main(["train", "--data", "items.json", "--output", "run", "--max_steps", "1", *chosen]) == 0
    head, _, _ = capsys.readouterr().out.partition("# the other")
    shown = yaml.safe_load(head)
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert set(shown) == {"model", "data", "rank", "targets", "lr", "output", "max_steps"}
    assert {name: written[name] for name in shown} == shown and len(written) > 50
