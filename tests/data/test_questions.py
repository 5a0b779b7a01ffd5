"""Question data: its format, training on it, and the published parts of Orca-Math out of a hub data set."""

import json

import pytest
import yaml

from doratune.cli.main import main
from doratune.data import encoder, load_items, published
from doratune.data.formats.questions import prompt_of
from doratune.errors import UserError
from doratune.evaluation.kinds import kind_of
from doratune.evaluation.tasks import load_task
from doratune.training.recipe import TrainRecipe

ITEM = {"question": "What is 2 + 3?", "answer": "It is 5."}


def test_the_published_prompt(tiny_tokenizer):
    assert prompt_of(ITEM) == "###Question:\nWhat is 2 + 3?\n###Answer:\n"
    assert kind_of(ITEM).prompt(ITEM) == prompt_of(ITEM)
    encoded = encoder("questions")(ITEM, tiny_tokenizer)
    learned = [token for token, learn in zip(encoded.ids, encoded.answer) if learn]
    assert tiny_tokenizer.decode(learned) == "It is 5.</s>"
    assert encoded.ids[: -len(learned)] == tiny_tokenizer(prompt_of(ITEM))["input_ids"]


@pytest.mark.parametrize("wrong", [{"question": " "}, {"question": 3}, {"answer": ""}, {"answer": None}])
def test_an_item_without_question_or_answer(wrong, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ITEM) + "\n" + json.dumps(ITEM | wrong) + "\n")
    with pytest.raises(UserError, match=f"item 2 has no text under '{next(iter(wrong))}'"):
        load_items(str(path))


def test_training_and_scoring_a_file(tiny_folder, tmp_path, capsys):
    """doratune train learns question data, and scores it by exact match at its end."""
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"question": f"{i} + 1?", "answer": f"It is {i + 1}."} for i in range(8)]))
    words = ["--model", str(tiny_folder), "--rank", "2", "--targets", "[q_proj]", "--max_steps", "1", "--batch_size", "2"]
    words += ["--dtype", "float32", "--tensorboard", "false", "--max_length", "200", "--output", str(tmp_path / "run")]
    words += ["--tasks", f"[{path}]", "--tasks_limit", "2", "--tasks_protocol", "generate"]
    # 1,024 new tokens are more than a tiny model's 256 positions, which are rotary: a note, and no error
    assert main(["train", "--data", str(path), *words]) == 0
    (result,) = json.loads((tmp_path / "run" / "scores" / "after" / "results.json").read_text())["results"]
    assert (result["total"], result["protocol"]) == (2, "generate")


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A data set where `datasets` looks for a hub id first: a folder of that name in the working directory."""
    folder = tmp_path / "owner" / "problems"
    folder.mkdir(parents=True)
    rows = [{"question": f"number {i}?", "answer": f"it is {i}"} for i in range(50)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    parts = {"orca_math_100k": (0, 30), "orca_math": (40, 45)}
    for name, (start, stop) in parts.items():
        monkeypatch.setitem(published.HUB_PARTS, name, published.HubPart("owner/problems", 50, 42, start, stop))
    return folder


def test_the_parts_share_no_problem(hub_folder):
    items, kind = load_items("orca_math_100k")
    name, held_out = load_task("orca_math")
    assert (kind.name, len(items), name, len(held_out)) == ("questions", 30, "orca_math", 5)
    assert not {i["question"] for i in items} & {i["question"] for i in held_out}
    assert [i["question"] for i in items] != [f"number {i}?" for i in range(30)], "in the order of the shuffle"
    assert load_items("orca_math_100k[:3]")[0] == items[:3] and load_task("orca_math", limit=2)[1] == held_out[:2]


def test_a_data_set_that_has_changed_is_refused(hub_folder):
    with open(hub_folder / "train.jsonl", "a") as file:
        file.write(json.dumps(ITEM) + "\n")
    for load in (lambda: load_items("orca_math_100k"), lambda: load_task("orca_math")):
        with pytest.raises(UserError, match="owner/problems has 51 items, 50 were published"):
            load()


def test_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="cannot load the data set microsoft/orca-math-word-problems-200k from the hub"):
        load_task("orca_math")


def test_the_published_recipe(pytestconfig):
    """Fig. 6: 100,000 problems, 500 held out, NF4 under DoRA; q, k, v, gate, up, down of LLaMA2-7B at rank 64, counted."""
    recipe = TrainRecipe(**yaml.safe_load((pytestconfig.rootpath / "recipes" / "orca_math.yaml").read_text()))
    recipe.check()
    sizes = {name: part.stop - part.start for name, part in published.HUB_PARTS.items()}
    assert sizes[recipe.data] == 100_000 and [sizes[task] for task in recipe.tasks] == [500]
    assert (recipe.method, recipe.quantize, recipe.rank, recipe.alpha) == ("dora", "nf4", 64, 16)
