"""A user's own task: items in the formats of training data, asked as training asks, and every metric against its definition."""

import json
import random

import pytest
import torch
from conftest import small_tokenizer, tiny_llama

import doratune
from doratune.cli.main import main
from doratune.data import DataSettings
from doratune.data.encode import prompt_ids
from doratune.data.formats import format_named
from doratune.errors import UserError
from doratune.evaluation.evaluate import check_items, evaluate
from doratune.evaluation.kinds import kind_of
from doratune.evaluation.metrics import METRICS, function_at
from doratune.evaluation.own_items import OwnTask
from doratune.evaluation.tasks import load_task

ASKED = "the correct answer is"
FORMS = {
    "chat": {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "true"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "true"}]},
    "instruction": {"instruction": ASKED, "input": "", "output": "true"},
    "completion": {"prompt": ASKED, "completion": "true"},
    "questions": {"question": ASKED, "answer": "true"},
}


def written(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


@pytest.mark.parametrize("prompt", ["plain", "template"])
@pytest.mark.parametrize("form", FORMS)
def test_an_item_is_asked_as_training_asks_it(form, prompt, tmp_path):
    """The tokens in front of the answer are those of a training example."""
    tokenizer = small_tokenizer()
    _, items = load_task(written(tmp_path / "t.jsonl", [FORMS[form]]), own=OwnTask(prompt=prompt))
    kind = kind_of(items[0])
    reading = DataSettings(prompt=prompt)
    example = format_named(form).encode(FORMS[form], tokenizer, reading)
    assert kind.tokens(items[0], tokenizer) == example.ids[: example.last_answer] == prompt_ids(example, tokenizer)
    assert kind.gold(items[0]) == "true" and kind.protocols == ("generate",)


def test_a_tokenizer_without_a_template_asks_plainly(tmp_path):
    tokenizer = small_tokenizer()
    _, items = load_task(written(tmp_path / "t.jsonl", [FORMS["completion"]]))
    templated = tokenizer.decode(kind_of(items[0]).tokens(items[0], tokenizer))
    tokenizer.chat_template = None
    assert tokenizer.decode(kind_of(items[0]).tokens(items[0], tokenizer)) == ASKED
    assert templated == f"[user]{ASKED}</s>[assistant]"


VALUES = {
    "exact_match": [("Paris", "Paris", 1), (" Paris\n", "Paris", 1), ("paris", "Paris", 0), ("", "Paris", 0)],
    "f1": [
        ("the cat sat", "a cat sat down", 2 * 2 / 5),
        ("Paris.", "paris", 1),
        ("", "paris", 0),
        ("Москва — столица", "столица", 2 / 3),
    ],
    "rouge_l": [("police killed the gunman", "police kill the gunman", 0.75), ("x", "y", 0), ("東京 大阪", "大阪 東京", 0.5)],
    "json": [('{"a": 1}', "", 1), ('```json\n{"a": 1}\n```', "", 1), ("{'a': 1}", "", 0), ("", "", 0), ("[" * 5000, "", 0)],
    "json_match": [('{"b":2,"a":1}', '{"a": 1, "b": 2}', 1), ('{"a": 2}', '{"a": 1}', 0), ("no", "no", 0)],
}


@pytest.mark.parametrize("name", VALUES)
def test_metrics_are_what_they_are_called(name):
    if name == "rouge_l":
        pytest.importorskip("rouge_score")
    for output, gold, value in VALUES[name]:
        assert METRICS[name](output, gold, {}) == pytest.approx(value), (output, gold)


def test_rouge_is_the_longest_common_subsequence():
    """Against a direct computation, on random words."""
    pytest.importorskip("rouge_score")

    def common(a, b):
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]

    draw = random.Random(0)
    for _ in range(50):
        a, b = (draw.choices("abcd", k=draw.randint(1, 9)) for _ in range(2))
        assert METRICS["rouge_l"](" ".join(a), " ".join(b), {}) == pytest.approx(2 * common(a, b) / (len(a) + len(b)))


def test_patterns_are_bounded():
    assert METRICS["regex"]("order A-17", "", {"pattern": r"[A-Z]-\d+"}) == 1
    assert METRICS["regex"]("order 17", "", {"pattern": r"[A-Z]-\d+"}) == 0
    with pytest.raises(UserError, match="searches without end"):
        METRICS["regex"]("a" * 60, "", {"pattern": r"(a|aa)+$b"})


@pytest.fixture(scope="module")
def model():
    model = tiny_llama()
    with torch.no_grad():  # a model whose answers differ by what is asked
        for p in model.parameters():
            p.mul_(3)
    return model


def test_a_free_answer_is_scored_by_each_metric(model, tmp_path, tiny_tokenizer):
    """The gold of one item is what the model writes: right; of another it is not. Means are those of the records."""
    probe = [FORMS["completion"], {"prompt": "false option1", "completion": "x"}]
    _, items = load_task(written(tmp_path / "probe.jsonl", probe), own=OwnTask(("exact_match",)))
    written_out = [r["output"] for r in records(model, tiny_tokenizer, items, tmp_path / "probe")]
    real = [{**probe[0], "completion": written_out[0].strip() or "?"}, probe[1]]
    names = ("exact_match", "f1", "json")
    _, items = load_task(written(tmp_path / "real.jsonl", real), own=OwnTask(names))
    rows = records(model, tiny_tokenizer, items, tmp_path / "real")
    result = json.loads((tmp_path / "real" / "results.json").read_text())["results"][0]
    assert [row["correct"] for row in rows] == [True, False] and result["accuracy"] == 0.5
    assert list(result["metrics"]) == list(names)
    for name in names:
        assert result["metrics"][name]["mean"] == pytest.approx(sum(row["measures"][name] for row in rows) / 2)


def records(model, tokenizer, items, output):
    evaluate(model, tokenizer, [("own", items)], ("generate",), max_new_tokens=6, output=output)
    return [json.loads(line) for line in (output / "own.generate.jsonl").read_text().splitlines()]


CHOICES = [
    {"question": ASKED, "choices": ["true", "false", "option1"], "answer": "B"},
    {"question": ASKED, "choices": ["true", "false", "option1"], "answer": 1},
    {"question": ASKED, "choices": ["true", "false", "option1"], "answer": "false"},
    {"instruction": ASKED, "choices": ["true", "false", "option1"], "answer": "false"},
    {"prompt": ASKED, "choices": ["true", "false", "option1"], "completion": "false"},
    {
        "messages": FORMS["chat"]["messages"][:1] + [{"role": "assistant", "content": "false"}],
        "choices": ["true", "false", "option1"],
    },
]


@pytest.mark.parametrize("item", CHOICES)
def test_choices_by_likelihood_are_the_sums_of_their_tokens(item, model, tmp_path, tiny_tokenizer):
    _, items = load_task(written(tmp_path / "c.jsonl", [item]))
    check_items(model, tiny_tokenizer, [("c", items)], ("likelihood",))
    evaluate(model, tiny_tokenizer, [("c", items)], ("likelihood",), output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "c.likelihood.jsonl").read_text())
    prompt = kind_of(items[0]).tokens(items[0], tiny_tokenizer)
    for choice, score in record["scores"].items():
        answer = tiny_tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(logp[range(len(answer)), answer].sum().item(), rel=1e-4)
    assert record["gold"] == "false" and record["correct"] == (max(record["scores"], key=record["scores"].get) == "false")


def test_a_written_answer_names_the_first_choice(tmp_path):
    _, items = load_task(written(tmp_path / "c.jsonl", CHOICES[:1]))
    kind = kind_of(items[0])
    assert kind.answer("I say FALSE, not true", items[0]) == "false" and kind.answer("none of them", items[0]) is None
    assert kind.chance(items[0]) == pytest.approx(1 / 3)


SCORE = (
    "def score(output, item):\n    return output.startswith(item['start'])\n\ndef wrong(output, item):\n    return 7\n\nvalue = 3\n"
)


def test_a_function_of_one_s_own(tmp_path):
    (tmp_path / "own.py").write_text(SCORE)
    place = str(tmp_path / "own.py")
    assert function_at(f"{place}:score")("yes, it is", "", {"start": "yes"}) == 1
    for name, words in (("value", "has no function 'value'"), ("missing", "has no function")):
        with pytest.raises(UserError, match=words):
            function_at(f"{place}:{name}")
    with pytest.raises(UserError, match="expected a number from 0 to 1"):
        function_at(f"{place}:wrong")("x", "", {})
    with pytest.raises(UserError, match=r"fails on .x. .KeyError"):
        function_at(f"{place}:score")("x", "", {})
    (tmp_path / "own.py").write_text("import nowhere\n")
    with pytest.raises(UserError, match=r"cannot be run .ModuleNotFoundError"):
        function_at(f"{place}:score")
    with pytest.raises(UserError, match=r"expected FILE\.py:NAME"):
        function_at("nowhere.py:score")


BAD = [
    ([{"prompt": "a", "completion": ""}], [], "no text under 'completion'"),
    ([{"question": "a", "choices": ["x", "y"], "answer": "z"}], [], "'z', which is none of its 2 choices"),
    ([{"question": "a", "choices": ["x", "x"], "answer": "x"}], [], "two or more different texts"),
    ([{"question": "a", "choices": ["x", "y"], "answer": 2}], [], "2, which is none"),
    ([{"prompt": "a", "completion": "b"}], ["--metrics", "regex"], "no 'pattern' for the metric regex"),
    ([{"prompt": "a", "completion": "b"}], ["--metrics", "regex", "--pattern", "(a"], "not a valid regular expression"),
    ([{"prompt": "a", "completion": "b"}], ["--metrics", "bleu"], "metrics"),
    ([{"prompt": "a", "completion": "b"}], ["--metrics", "function"], "--function FILE.py:NAME together"),
    ([{"prompt": "a", "completion": "b"}], ["--function", "x.py:f"], "--metrics function"),
    ([{"prompt": "a", "completion": "b"}], ["--protocol", "likelihood"], "has no protocol likelihood"),
    ([{"text": "a"}], ["--metrics", "f1"], "holds no answer to compare with"),
    ([{"chosen": "a", "rejected": "b", "prompt": "c"}], ["--metrics", "f1"], "holds no answer to compare with"),
    ([{"prompt": "a", "completion": "b"}, {"a": 1}], ["--metrics", "f1"], "item 2 has the keys 'a'"),
    ([{"prompt": "say </s>", "completion": "b"}], ["--prompt", "template"], "special token"),
    ([{"instruction": "a", "answer": "many"}], [], "for free answers give --metrics"),
]


@pytest.mark.parametrize(("items", "flags", "message"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_scored_is_one_line(items, flags, message, tiny_folder, tmp_path, capsys):
    task = written(tmp_path / "t.jsonl", items)
    words = ["evaluate", "--model", str(tiny_folder), "--task", task, "--output", str(tmp_path / "out"), *flags]
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error, error
    assert not (tmp_path / "out").exists()


def test_the_command_asks_a_chat_adapter_in_its_template(tiny_folder, tmp_path, capsys):
    """An adapter that was trained under prompt: template is asked so, another one plainly; by its run's recipe."""
    task = written(tmp_path / "mine.jsonl", [{"instruction": f"say {i}", "output": "it is true 1"} for i in range(3)])
    asked = {}
    for prompt in ("template", "plain"):
        run = tmp_path / prompt
        run.mkdir()
        doratune.save(doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2)), run / "adapter")
        (run / "recipe.yaml").write_text(f"model: {tiny_folder}\nprompt: {prompt}\n")
        words = ["evaluate", "--model", str(tiny_folder), "--adapter", str(run / "adapter"), "--task", task]
        assert main([*words, "--metrics", "f1", "json", "--max_new_tokens", "4", "--output", str(tmp_path / f"out-{prompt}")]) == 0
        shown = capsys.readouterr().out
        assert "mine generate: f1 " in shown and "json " in shown
        asked[prompt] = (tmp_path / f"out-{prompt}" / "mine.generate.jsonl").read_text()
    assert asked["template"] != asked["plain"]


def test_published_items_stay_what_they_are(tmp_path):
    """Numbers, allowed answers: their kinds, unless metrics are asked for."""
    numeric = [{"question": "1 + 1?", "answer": "it is 2"}]
    path = written(tmp_path / "n.jsonl", numeric)
    assert kind_of(load_task(path)[1][0]).name == "orca_math"
    assert kind_of(load_task(path, own=OwnTask(("f1",)))[1][0]).name == "own"
    mixed = written(tmp_path / "m.jsonl", [*numeric, {"question": "capital?", "answer": "Paris"}])
    assert {kind_of(item).name for item in load_task(mixed)[1]} == {"own"}
