"""Number tasks: what is read as a number, LLM-Adapters' rule beside ours, batches, both protocols, Orca-Math's exact match."""

import json

import pytest
from conftest import tiny_llama

from doratune.cli.main import main
from doratune.errors import UserError
from doratune.evaluation.evaluate import evaluate
from doratune.evaluation.generate import generate, read_output
from doratune.evaluation.kinds import kind_of
from doratune.evaluation.numbers import last_number, number_of, published_number
from doratune.evaluation.paper import paper, reader
from doratune.evaluation.summary import summarize
from doratune.evaluation.tasks import load_task, majority

READINGS = {
    # text: ours, LLM-Adapters' script
    "1,234.50": (1234.5, 1234.5),
    "it costs $1,000,000.": (1e6, 1e6),
    "1\u202f234 or 5\u00a0678": (5678, 678),
    "−3": (-3, 3),
    "-3": (-3, -3),
    "-$3.50": (-3.5, 3.5),
    "$-3": (-3, -3),
    "–7": (-7, 7),
    "½": (0.5, None),
    "2½ cups": (2.5, 2),
    "-¾": (-0.75, None),
    "⅜ of 1,000": (1000, 1000),
    "3/4": (0.75, 4),
    "1 1/2": (1.5, 2),
    "24/4=6": (6, 6),
    "3/0": (None, 0),
    "The answer is 4.": (4, 4),
    "50%": (50, 50),
    ".5": (0.5, 5),
    "1.5e3": (1500, 3),
    "12 apples, 7": (7, 7),
    "1,2": (2, 12),
    "5-3": (3, -3),
    "10 - 3 = 7": (7, 7),
    "pages 10–20": (20, 20),
    "(2)-1": (1, -1),
    "answer1": (1, 1),
    "twelve": (None, None),
    "": (None, None),
    "−": (None, None),
    "1e999": (None, 999),
    "１２": (12, 12),
}


@pytest.mark.parametrize("text", READINGS)
def test_the_last_number_of_a_text(text):
    ours, published = READINGS[text]
    assert last_number(text) == ours
    assert published_number(text) == published


@pytest.mark.parametrize(
    ("text", "value"),
    [("15.0", 15), (" 1,234 ", 1234), (7, 7), (0.125, 0.125), ("½", 0.5), ("−3", -3), ("1/4", 0.25)]
    + [(text, None) for text in ("C", "", "15 apples", "3 and 4", True, None, float("nan"), "nan", "1e999", 10**400, [3])],
)
def test_what_can_be_a_right_answer(text, value):
    assert number_of(text) == value
    assert (kind_of({"instruction": "?", "answer": text}) is not None) == (value is not None)


def problem(answer="15.0", text="How many?"):
    return {"instruction": text, "input": "", "output": "", "answer": answer}


@pytest.mark.parametrize(
    ("output", "answer", "right", "published"),
    [
        ("3 + 12 = 15. The answer is 15.", "15", True, True),
        ("The answer is 15.001 miles", "15.001", True, True),
        ("The answer is 15.002 miles", "15.002", False, False),
        ("15 apples, that is −15", "-15", False, True),
        ("one and 14½ and ½ make 15", "15", True, True),
        ("15\n\n### Instruction:\nSam has 3", "15", True, False),
        ("none at all", None, False, False),
        ("", None, False, False),
    ],
)
def test_verdicts(output, answer, right, published):
    assert read_output(output, problem()) == (answer, right)
    assert reader(kind_of(problem()))(output, problem())[1] == published


QUESTION = {"question": "How many?", "answer": "He has 3 boxes of $5, so 3 * 5 = $15."}


@pytest.mark.parametrize(
    ("output", "right", "published"),
    [
        ("It is $15.", True, True),
        ("It is 15.", True, False),  # the published exact match compares texts
        ("15.0 dollars", True, False),
        ("$16", False, False),
        ("$15\n###Question:\nAnd 7?", True, False),
        ("nothing", False, False),
    ],
)
def test_orca_maths_exact_match(output, right, published):
    assert read_output(output, QUESTION)[1] == right
    assert reader(kind_of(QUESTION))(output, QUESTION)[1] == published
    assert read_output("#### 1,072", {"question": "?", "answer": "… so 1072\n#### 1072"}) == ("1072", True)


def test_ratios_and_nothing_in_both_are_the_published_exact_match():
    ratio = {"question": "?", "answer": "mixed 3:4"}
    read = reader(kind_of(ratio))
    assert read("3:4", ratio) == ("3:4", True) and read("4", ratio) == ("4", False)
    assert kind_of({"question": "?", "answer": "none"}) is None


def writer():
    """A tiny model whose outputs differ between prompts and hold digits."""
    model = tiny_llama(seed=3)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def word_problems(count):
    return [problem(str(i % 4), f"Sam has {i} apples{', and so on' * (i % 5)}. How many?") for i in range(count)]


def test_one_at_a_time_is_a_batch_of_32(tiny_tokenizer, monkeypatch):
    """Every output and verdict, of both protocols and of both kinds, also where a batch holds several."""
    for kind in {kind_of(e) for e in (problem(), QUESTION)}:
        monkeypatch.setitem(kind.published.settings, "max_new_tokens", 6)
    entries = [*word_problems(20), *({"question": f"{i} and {i}?" * (1 + i % 3), "answer": str(i)} for i in range(13))]
    for run in (lambda size: generate(writer(), tiny_tokenizer, entries, size, 1, 12, print), None):
        run = run or (lambda size: paper(writer(), tiny_tokenizer, entries, size, lambda n: None))
        one, many = run(1), run(32)
        assert one == many and len({r["output"] for r in one}) > 5
        assert len({r["prompt"] for r in one}) == len(entries)


def test_the_real_model_one_at_a_time_and_in_batches(smollm2, shared_data):
    """SmolLM2 in float32 on published problems."""
    from doratune.support.models import load_model, load_tokenizer

    model, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    entries = [e for t in ("AddSub", "gsm8k") for e in load_task(str(shared_data / "math" / f"{t}_test.json"), limit=3)[1]]
    one, six = (generate(model, tokenizer, entries, size, 1, 12, lambda n: None) for size in (1, 6))
    assert one == six


def test_an_output_ends_where_the_model_begins_another_problem(tiny_tokenizer, monkeypatch):
    """The stop changes no verdict: what follows a heading is not read anyway."""
    kind = kind_of(problem())
    for text, settled in (("15", False), ("15\n## so", False), ("15\n### Instr", True)):
        assert kind.settled(text, problem()) == settled
        assert read_output(text, problem()) == read_output(text + "\n### 99", problem()) == ("15", True)


def test_figures(tiny_tokenizer):
    entries = [problem("1.0"), problem("1"), problem("2"), problem("3")]
    assert majority(entries) == 0.5
    records = [{"correct": i < 1, "answer": None if i else "1"} for i in range(4)]
    result = summarize("AddSub", entries, records, "generate", 1.0)
    assert (result["chance"], result["unparsable"], result["accuracy"]) == (0, 0.75, 0.25)


def test_published_files(shared_data):
    counts = {"AddSub": 395, "MultiArith": 600, "SingleEq": 508, "svamp": 1000, "gsm8k": 1319}
    for task, count in counts.items():
        _, items = load_task(str(shared_data / "math" / f"{task}_test.json"))
        assert len(items) == count and {kind_of(item).name for item in items} == {"arithmetic"}
        worked = [(item["output"], item) for item in items if item["output"].strip()]
        ours, theirs = ([read(text, item)[1] for text, item in worked] for read in (read_output, reader(kind_of(items[0]))))
        assert sum(a != b for a, b in zip(ours, theirs)) <= 0.01 * len(worked)
        assert sum(ours) > 0.5 * len(worked)
    with pytest.raises(UserError, match=r"answer is '[A-E]', which no task's pattern accepts"):
        load_task(str(shared_data / "math" / "train.json"))


def test_protocols(tiny_tokenizer):
    model, entries = tiny_llama(), word_problems(2)
    choice = {"instruction": "Answer format: true/false", "answer": "true"}
    both = evaluate(model, tiny_tokenizer, [("n", entries), ("c", [choice])], max_new_tokens=4)
    assert [(r["task"], r["protocol"]) for r in both["results"]] == [("n", "generate"), ("c", "generate"), ("c", "likelihood")]
    with pytest.raises(UserError, match=r"n has no protocol likelihood: .* use generate or paper"):
        evaluate(model, tiny_tokenizer, [("c", [choice]), ("n", entries)], ("likelihood",))
    with pytest.raises(UserError, match="max_new_tokens is 32, but protocol paper has max_new_tokens 256"):
        evaluate(model, tiny_tokenizer, [("n", entries)], ("paper",), max_new_tokens=32)
    with pytest.raises(UserError, match="beams is 4, but protocol paper has beams 1"):
        evaluate(model, tiny_tokenizer, [("q", [QUESTION])], ("paper",), beams=4)


def test_command_line(tiny_folder, tmp_path, capsys):
    (tmp_path / "AddSub_test.json").write_text(json.dumps(word_problems(3)))
    (tmp_path / "orca.jsonl").write_text(json.dumps(QUESTION) + "\n")
    tasks = f"[{tmp_path / 'AddSub_test.json'}, {tmp_path / 'orca.jsonl'}]"
    command = ["evaluate", "--model", str(tiny_folder), "--task", tasks, "--output", str(tmp_path / "out")]
    assert main([*command, "--max_new_tokens", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [(r["task"], r["total"], r["protocol"]) for r in printed["results"]] == [
        ("AddSub_test", 3, "generate"),
        ("orca", 1, "generate"),
    ]
    record = json.loads((tmp_path / "out" / "orca.generate.jsonl").read_text())
    assert record["prompt"] == "###Question:\nHow many?\n###Answer:\n" and record["gold"] == "15"
    for wrong, message in (
        (["--protocol", "likelihood"], "AddSub_test has no protocol likelihood"),
        (["--task", "addsub"], "did you mean 'AddSub'"),
        (["--task", str(tmp_path / "bad.json")], "item 2 has no text under 'instruction'"),
        (["--task", str(tmp_path / "blank.jsonl")], "item 1 has no text under 'question'"),
        (["--task", str(tmp_path / "wordy.jsonl")], "item 1: answer is 'many', which no task's pattern accepts"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps([problem(), problem(text=" ")]))
        (tmp_path / "blank.jsonl").write_text(json.dumps({"question": " ", "answer": "3"}))
        (tmp_path / "wordy.jsonl").write_text(json.dumps({"instruction": "?", "answer": "many"}))
        assert main([*command, "--overwrite", *wrong]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1


def test_a_grid_of_word_problems(tiny_folder, tmp_path, capsys):
    """doratune compare trains on problems and scores by the last number; a score that the task does not have is refused first."""
    lines = [problem(str(i % 4), f"Sam has {i}. How many?") | {"output": f"The answer is {i % 4}."} for i in range(12)]
    (tmp_path / "train.json").write_text(json.dumps(lines))
    (tmp_path / "sums.json").write_text(json.dumps(word_problems(3)))
    shared = {"model": str(tiny_folder), "data": str(tmp_path / "train.json"), "tasks": [str(tmp_path / "sums.json")]}
    shared |= {"max_steps": 1, "batch_size": 2, "rank": 2, "targets": ["q_proj"], "tensorboard": False, "dtype": "float32"}
    grid = tmp_path / "grid.yaml"
    grid.write_text(json.dumps({"settings": shared, "methods": ["lora"], "seeds": [0], "output": str(tmp_path / "out")}))
    assert main(["compare", str(grid)]) == 2
    assert "score is likelihood, which task " in (error := capsys.readouterr().err) and "set score: generate or paper" in error
    assert main(["compare", str(grid), "--score", "generate"]) == 0
    summary = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert set(summary["rows"][0]["scores"]) == {"generate"}
    assert json.loads((tmp_path / "out" / "base" / "results.json").read_text())["results"][0]["task"] == "sums"
