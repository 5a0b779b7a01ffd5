"""`doratune data`: what is shown, counted, found and written, as `doratune train` would then use it."""

import json

import pytest
from conftest import small_tokenizer, tiny_llama
from test_formats import THINKING, TOOLS

from doratune.cli.main import main
from doratune.data import DataSettings, encoder, load_items
from doratune.data.encode import encode_all
from doratune.data.leakage import TestQuestions
from doratune.data.survey import percentile
from doratune.data.visible import visible
from doratune.support.models import load_tokenizer


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | more


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose template has tools."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TOOLS
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ITEMS = [
    chat("what is the answer", "one"),
    chat("what is it", ""),
    chat("what is the answer", "one"),
    {"messages": [{"role": "usr", "content": "a"}]},
    chat("what is the answer", "two"),
    chat("say </s> now", "no"),
    chat("one two three four five six seven", "eight"),
    chat("long", "word " * 80),
]


def test_every_item_is_accounted_for(model, tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", ITEMS)
    test = write(tmp_path / "test.jsonl", [chat("One, two, three, four, five, six: seven!", "eight")])
    words = ["data", path, "--model", model, "--test", test, "--max_length", "100", "--json"]
    assert main(words) == 1
    output = capsys.readouterr().out
    assert "data_format: chat (messages of role and content, tools), by its keys; --data_format overrules" in output
    assert "<turn>user\nwhat is the answer<end>\n<turn>assistant\n⟦one<end>\n⟧" in output
    result = json.loads(output.splitlines()[-1])
    counts = {"unusable": 3, "odd": 1, "double": 1, "leaked": 1, "clean": 3, "examples": 5}
    assert result["counts"] == counts | {"whole": 4, "cut": 0, "divided": 0, "skipped": 1}
    assert [line.split("item ")[1][0] for line in result["unusable"]] == ["2", "4", "6"]
    assert "item 3 is item 1 again" in result["double"][0]
    assert "item 5 asks what item 1 asks, and has another answer" in result["odd"][0]
    assert "item 7 asks the same as item 1 of the test" in result["leaked"][0]
    clean = tmp_path / "clean.jsonl"
    assert main([*words, "--fix", str(clean)]) == 0
    assert [json.loads(line) for line in clean.read_text().splitlines()] == [ITEMS[0], ITEMS[4], ITEMS[7]]
    assert main(["data", str(clean), "--model", model]) == 0
    assert "3 items are clean; 0 unusable, 0 double, 0 in the test" in capsys.readouterr().out


def test_what_is_said_is_what_training_does(model, tmp_path, capsys):
    tokenizer = load_tokenizer(model)
    items = [chat(f"q {n} " + "word " * n * 3, "answer " * (1 + n % 5)) for n in range(30)]
    path = write(tmp_path / "x.jsonl", items)
    for length, policy in ((60, "cut"), (60, "skip"), (20, "cut")):
        assert main(["data", path, "--model", model, "--max_length", str(length), "--too_long", policy, "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        rows, report = encode_all(load_items(path)[0], encoder("chat"), tokenizer, length, policy)
        assert (result["counts"]["cut"], result["counts"]["skipped"]) == (report.cut, report.skipped)
        whole, _ = encode_all(items, encoder("chat"), tokenizer, 10_000)
        lengths = sorted(row["length"] for row in whole)
        assert result["tokens"]["tokens"]["50 %"] == lengths[14] and result["tokens"]["tokens"]["most"] == lengths[-1]
        assert result["tokens"]["tokens"]["all"] == sum(lengths)


def test_a_text_is_divided_and_nothing_of_it_lost(model, tmp_path, capsys):
    tokenizer = load_tokenizer(model)
    text = {"text": "the correct answer is " * 40}
    path = write(tmp_path / "x.jsonl", [text, {"text": "short"}])
    rows, report = encode_all(load_items(path)[0], encoder("text"), tokenizer, 32)
    assert [token for row in rows[:-1] for token in row["input_ids"]] == [
        *tokenizer(text["text"])["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert max(row["length"] for row in rows) == 32 and report.divided == 1 and "1 texts divided" in str(report)
    assert main(["data", path, "--model", model, "--max_length", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["counts"]["divided"] == 1
    rows, report = encode_all(load_items(path)[0], encoder("text"), tokenizer, 32, "skip")
    assert len(rows) == 1 and report.skipped == 1


@pytest.mark.parametrize("template", [THINKING, TOOLS])
def test_the_marks_stand_around_what_is_learned(template, tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    example = encoder("chat")(chat("é ü\n", "日本 ok"), tokenizer)
    text = visible(example, tokenizer)
    assert text.replace("⟦", "").replace("⟧", "") == tokenizer.decode(example.ids)
    assert text.endswith("⟦日本 ok<end>\n⟧")
    assert visible(example, tokenizer, "", "") == tokenizer.decode(example.ids)


def test_percentiles():
    assert [percentile([5, 1, 3], p) for p in (1, 33, 34, 50, 67, 99, 100)] == [1, 1, 3, 3, 5, 5, 5]


def test_leakage_is_of_words_and_not_of_the_tasks_phrases():
    phrase = "please answer the following question with true or false question "
    questions = TestQuestions((f"item {n}", f"{phrase}is {thing} a kind of {kind} or is it not") for n, (thing, kind) in enumerate(
        [("oak", "tree"), ("trout", "fish"), ("robin", "bird"), ("copper", "metal")], 1))  # fmt: skip
    assert questions.met_by(f"{phrase}Is OAK a kind of tree, or is it not?") == ("the same", "item 1")
    assert questions.met_by(f"well: {phrase}is trout a kind of fish or is it not, really") == ("nearly the same", "item 2")
    assert questions.met_by(f"{phrase}does ice float on water or does it sink") is None
    assert questions.met_by("robin") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "M"], "data is not set; give a file"),
        (["DATA"], "model is not set; give --model M"),
        (["DATA", "--model", "M", "--fix", "DATA"], "which this command reads"),
        (["DATA", "--model", "M", "--fix", "OUT.json"], "give a name that ends in .jsonl"),
        (["DATA", "--model", "M", "--fix", "OLD.jsonl"], "exists; give another name, or --overwrite"),
        (["none.jsonl", "--model", "M"], "none.jsonl: no such data file"),
        (["DATA", "--model", "M", "--test", "none.json"], "none.json: no such data file"),
        (["DATA", "--model", "M", "--data_format", "text"], "no item that can be used"),
    ],
)
def test_wrong_calls_end_with_status_2_and_write_nothing(words, message, model, tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", ITEMS[:1])
    (tmp_path / "OLD.jsonl").write_text("old")
    places = {"DATA": path, "M": model, "OUT.json": str(tmp_path / "OUT.json"), "OLD.jsonl": str(tmp_path / "OLD.jsonl")}
    before = sorted(tmp_path.iterdir())
    assert main(["data", *(places.get(word, word) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "OLD.jsonl").read_text() == "old"


@pytest.mark.parametrize("name", ["alpaca_en_demo", "glaive_toolcall_en_demo", "dpo_en_demo"])
def test_real_files_go_through(name, model, shared_data, capsys, tmp_path):
    if not (shared_data / "instruct").is_dir():
        pytest.skip("the instruction sets are not on this machine")
    path = f"{shared_data / 'instruct' / name}.json[:60]"
    fixed = tmp_path / "clean.jsonl"
    assert main(["data", path, "--model", model, "--max_length", "200", "--fix", str(fixed), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    kind = {"alpaca_en_demo": "instruction", "glaive_toolcall_en_demo": "sharegpt", "dpo_en_demo": "preference"}[name]
    assert result["data_format"] == kind and result["counts"]["unusable"] == 0
    assert len(fixed.read_text().splitlines()) == result["counts"]["clean"] > 40
    if name != "dpo_en_demo":
        words = [
            "train",
            "--model",
            model,
            "--data",
            str(fixed),
            "--output",
            str(tmp_path / "run"),
            "--rank",
            "2",
            "--max_steps",
            "3",
        ]
        assert main([*words, "--dtype", "float32", "--tensorboard", "false", "--batch_size", "2", "--max_length", "1024"]) == 0
        assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 3


def test_the_settings_of_the_recipe_are_those_of_the_command():
    from dataclasses import fields

    from doratune.cli.data import DataCheck
    from doratune.training.recipe import TrainRecipe

    for f in fields(DataSettings):
        assert getattr(DataCheck(), f.name) == getattr(TrainRecipe(), f.name) == getattr(DataSettings(), f.name)
