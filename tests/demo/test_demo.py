"""The demonstration: its data, and one short run of all stages on the real model."""

import json
import re
from collections import Counter

import pytest
from transformers import AutoModelForCausalLM

from doratune.cli.main import main
from doratune.data import facts
from doratune.evaluation.kinds.commonsense import choices, family


def words(items):
    """All things named in a list of items: options, and the subject of a true/false question."""
    found = set()
    for item in items:
        text = item["instruction"]
        found |= {m.strip(" .") for m in re.findall(r"(?:Answer|Option)\d: (.*?)(?= Answer| Option|\n|$)", text)}
        if m := re.search(r"question: (?:is|would you call|can you say that) (?:an? )?(\S+) ", text):
            found.add(m[1])
    return found


def test_no_test_thing_is_in_training():
    train, test = facts.items("train"), facts.items("test")
    assert len(train) >= 600
    assert len(test) >= 200
    halves = [{n for names in facts.things(half).values() for n in names} for half in ("train", "test")]
    assert not halves[0] & halves[1]
    assert words(train) - {"How"} <= halves[0]
    assert words(test) - {"How"} <= halves[1]
    goals = [
        {re.search(r"How do you (.*?)\?", i["instruction"])[1] for i in half if "How do you" in i["instruction"]}
        for half in (train, test)
    ]
    assert not goals[0] & goals[1]
    assert not {i["instruction"] for i in train} & {i["instruction"] for i in test}


@pytest.mark.parametrize("half", ["train", "test"])
def test_answers_are_balanced_and_in_form(half):
    items = facts.items(half)
    assert items == facts.items(half)
    for kind in {family(item) for item in items}:
        counts = Counter(item["answer"] for item in items if family(item) == kind)
        assert max(counts.values()) - min(counts.values()) <= 1
    for item in items:
        assert item["answer"] in choices(item)
        assert item["output"] == f"the correct answer is {item['answer']}"
    assert len({item["instruction"] for item in items}) == len(items)


def test_the_answers_are_true():
    kinds = {half: facts.things(half) for half in ("train", "test")}
    for half in ("train", "test"):
        for item in facts.items(half):
            text, answer = item["instruction"], item["answer"]
            if m := re.search(
                r"Which of these is an? (.*?)\?.*Answer1: (.*) Answer2: (.*) Answer3: (.*) Answer4: (.*)\n\n",
                text,
                re.S,
            ):
                right = [i for i in range(4) if m[i + 2] in kinds[half][m[1]]]
                assert right == [int(answer[-1]) - 1]


def test_all_stages_on_the_real_model(smollm2, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["demo", "--output", str(output), "--max_steps", "2", "--items", "8"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["merged_agrees"]["ok"]
    assert result["training"]["steps"] == 2
    assert result["training"]["magnitude_moved"] > 0
    expected = {"adapter", "merged", "recipe.yaml", "metrics.json", "loss.png", "report.md", "scores", "data"}
    assert expected <= {p.name for p in output.iterdir()}
    assert "format: outputs that hold an answer" in (output / "report.md").read_text()
    assert len((output / "scores" / "after" / "demo.generate.jsonl").read_text().splitlines()) == 8
    assert AutoModelForCausalLM.from_pretrained(output / "merged").dtype is not None
    assert main(["demo", "--output", str(output)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_mistakes_leave_nothing_behind(tmp_path, capsys):
    output = tmp_path / "run"
    for options, message in ((["--items", "0"], "items is 0"), (["--model", "/no/model"], "no such model folder")):
        assert main(["demo", "--output", str(output), *options]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
        assert not output.exists()
