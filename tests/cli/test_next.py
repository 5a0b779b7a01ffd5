"""The last line of a report says what can be run next: commands and settings that there are."""

import dataclasses
import json
import re
import shlex

import pytest

from doratune.cli.description import described
from doratune.cli.main import COMMANDS, main

ITEMS = [{"instruction": f"Is {i} even?", "input": "", "output": "true"} for i in range(8)]
TRAIN = (
    "train --model MODEL --data items.json --output run --max_steps 1 --batch_size 4 --rank 2 --tensorboard false --dtype float32"
)
STEPS = [
    ("data items.json --model MODEL", {"init"}),
    ("data doubles.json --model MODEL", {"data"}),
    ("plan --model MODEL --rank 2 --batch_size 2 --max_length 16 --device cpu", {"init"}),
    ("inspect --model MODEL --rank 2", {"init"}),
    (TRAIN, {"chat", "evaluate", "merge", "report"}),
    ("plan run/recipe.yaml --device cpu", {"train"}),
    ("inspect --adapter run/adapter", {"evaluate", "merge"}),
    ("evaluate --adapter run/adapter --task items.json --output scores", {"merge", "push"}),
    ("evaluate --model MODEL --task items.json --output scores_of_the_base", {"init"}),
    ("analyze run --output moved", {"report"}),
    ("report run --analysis none --output page.html", {"merge", "push"}),
    ("convert --adapter run/adapter --to doratune --output ours", {"inspect", "merge"}),
    ("export --adapter run/adapter --to lora --rank 2 --output lora", {"evaluate", "export"}),
    ("merge --adapter run/adapter --output merged", {"chat", "export", "push"}),
    ("extract --model MODEL --tuned merged --rank 2 --output extracted", {"evaluate", "merge"}),
    ("push --folder merged --to me/mine --dry_run", {"push"}),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("desk")
    (folder / "items.json").write_text(json.dumps(ITEMS))
    (folder / "doubles.json").write_text(json.dumps(ITEMS + ITEMS[:2]))
    return folder


@pytest.mark.parametrize(("command", "following"), STEPS, ids=[command for command, _ in STEPS])
def test_what_can_be_run_next(command, following, desk, tiny_folder, monkeypatch, capsys):
    """In the order in which a user takes them: each uses what those before it wrote."""
    monkeypatch.chdir(desk)
    assert main([str(tiny_folder) if word == "MODEL" else word for word in command.split()]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    commands = [shlex.split(one) for one in line.removeprefix("next: ").split(" | ")]
    assert {words[1] for words in commands} == following and all(words[0] == "doratune" for words in commands)
    for words in commands:
        known = {field.name for field in dataclasses.fields(described(words[1]).settings)}
        assert words[1] in COMMANDS and {flag for flag in re.findall(r"--(\w+)", shlex.join(words))} <= known


@pytest.mark.parametrize(
    ("flags", "taken"),
    [
        ("--rank 4 --memory 8 --targets q_proj v_proj --device cpu", "--rank 4 --targets q_proj v_proj"),
        ("--memory=8 --rank=4 --largest none", "--rank=4"),
        ("--device cpu --process 1", ""),
    ],
)
def test_after_a_plan_the_same_run_is_trained(flags, taken, desk, tiny_folder, monkeypatch, capsys):
    """The recipe with what was said beside it, but for what a plan alone knows."""
    monkeypatch.chdir(desk)
    (desk / "planned.yaml").write_text(f"model: {tiny_folder}\ndata: items.json\nbatch_size: 2\nmax_length: 16\n")
    assert main(["plan", "planned.yaml", *flags.split()]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == " ".join(["next: doratune train planned.yaml", *taken.split()])
