"""Evaluation: patterns, protocols, figures; the score does not depend on the batch size."""

import json
import math

import pytest
import torch
from conftest import tiny_llama

from doratune.cli.main import main
from doratune.data.instruction import prompt_of
from doratune.errors import UserError
from doratune.evaluation.evaluate import evaluate, load_tasks
from doratune.evaluation.kinds.commonsense import ANSWERS, choices, first_answer
from doratune.evaluation.likelihood import CONTINUATION, likelihood
from doratune.evaluation.summary import add_published, overall, summarize, table
from doratune.evaluation.tasks import chance, load_task, majority
from doratune.support.models import load_model, load_tokenizer


def item(answer="true", text="Is it?", form="true/false"):
    return {"instruction": f"{text}\n\nAnswer format: {form}", "input": "", "output": "", "answer": answer}


MIXED = [
    item("true", "Is a robin a bird?"),
    item("false", "Is a hammer a kind of fish, as far as you know?"),
    item("answer2", "Which is a fruit? Answer1: car Answer2: pear Answer3: shoe", "answer1/answer2/answer3"),
    item("solution1", "To cut: Solution1: a saw Solution2: a cup", "solution1/solution2"),
    item("option2", "A _ is a tree. Option1: pig Option2: oak", "option1/option2"),
    item("ending3", "He said Ending1: a Ending2: b Ending3: c Ending4: d", "ending1/ending2/ending3/ending4"),
]


def test_the_first_match_of_the_tasks_pattern_counts():
    cases = [
        ("the correct answer is true", "true", "true"),
        ("false, not true", "true", "false"),
        ("True", "true", None),  # the published pattern minds the case
        ("untrue things", "true", "true"),  # and finds an answer anywhere
        ("answer5 or answer1", "answer1", "answer5"),
        ("Answer1: x", "answer1", None),
        ("solution2", "solution1", "solution2"),
        ("option1option2", "option2", "option1"),
        ("ending4", "ending1", "ending4"),
        ("", "true", None),
    ]
    for text, gold, expected in cases:
        assert first_answer(text, {"instruction": "", "answer": gold}) == expected, text


def test_all_eight_tasks_have_their_answers():
    counts = {name: len(answers) for name, answers in ANSWERS.items()}
    assert counts == {
        "boolq": 2, "piqa": 2, "social_i_qa": 5, "hellaswag": 4, "winogrande": 2,
        "ARC-Easy": 5, "ARC-Challenge": 5, "openbookqa": 5,
    }  # fmt: skip


def test_chance_majority_and_choices():
    assert choices(MIXED[2]) == ("answer1", "answer2", "answer3")
    assert choices({"instruction": "no format line", "answer": "answer1"}) == ANSWERS["ARC-Easy"]
    assert chance(MIXED) == pytest.approx((0.5 + 0.5 + 1 / 3 + 0.5 + 0.5 + 0.25) / 6)
    assert majority([item("true")] * 3 + [item("false")]) == 0.75
    assert majority([item("true"), item("false"), item("option1", form="option1/option2")]) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_model(str(tiny_folder)), load_tokenizer(str(tiny_folder))


@pytest.mark.parametrize("beams", [1, 3])
def test_the_score_does_not_depend_on_the_batch_size(tiny, beams):
    model, tokenizer = tiny
    runs = [evaluate(model, tokenizer, [("mixed", MIXED)], batch_size=size, beams=beams, max_new_tokens=6) for size in (1, 2, 6)]
    for run in runs[1:]:
        for a, b in zip(run["results"], runs[0]["results"]):
            assert {k: v for k, v in a.items() if "second" not in k} == {k: v for k, v in b.items() if "second" not in k}


def test_the_real_model_scores_the_same_in_batches(smollm2):
    """SmolLM2 in fp32: every output and every choice, one by one and padded into batches."""
    model, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    from doratune.evaluation.generate import generate

    ignore = lambda n: None  # noqa: E731
    one, six = (generate(model, tokenizer, MIXED, size, 1, 8, ignore) for size in (1, 6))
    assert [r["output"] for r in one] == [r["output"] for r in six]
    one, four = (likelihood(model, tokenizer, MIXED, size, ignore) for size in (1, 4))
    for a, b in zip(one, four):
        assert a["answer"] == b["answer"]
        for choice, score in a["scores"].items():
            assert score == pytest.approx(b["scores"][choice], abs=2e-3)


def test_likelihood_is_the_sum_of_log_probabilities(tiny):
    """Against a plain loop: one unpadded sequence a choice."""
    model, tokenizer = tiny
    records = likelihood(model, tokenizer, MIXED, 4, lambda n: None)
    for record, entry in zip(records, MIXED):
        prompt = tokenizer(prompt_of(entry))["input_ids"]
        sums, means = {}, {}
        for choice in choices(entry):
            answer = tokenizer(CONTINUATION.format(choice), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            steps = [logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
            sums[choice], means[choice] = sum(steps), sum(steps) / len(steps)
        assert record["scores"] == pytest.approx(sums, abs=1e-3)
        assert record["answer"] == max(sums, key=sums.get)
        assert record["answer_normalized"] == max(means, key=means.get)


def test_figures():
    records = [{"correct": i < 3, "answer": None if i == 3 else "true"} for i in range(4)]
    result = summarize("boolq", [item()] * 4, records, "generate", 2.0)
    assert (result["right"], result["total"], result["accuracy"]) == (3, 4, 0.75)
    assert result["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert result["unparsable"] == 0.25
    assert result["items_per_second"] == 2.0
    beside = add_published(dict(result), "huggyllama/llama-7b", "dora", 8)
    assert beside["difference"] == pytest.approx(0.75 - 0.699)
    text = table([beside], 2**30)
    assert "69.9 (+5.1)" in text
    assert "boolq: 76.9 % in a public reproduction" in text
    assert "(-1.9)" in text
    assert "published" not in add_published(dict(result), "huggyllama/llama-7b", "dora", 12)
    assert "published" not in add_published(dict(result), "smollm2-135m-instruct", "dora", 8)
    llama2 = add_published(dict(result), "meta-llama/Llama-2-7b-hf", "dora", 16)
    assert llama2["published"][0]["accuracy"] == pytest.approx(0.72)
    assert overall([result]) is None
    assert overall([result, result])["standard_error"] == pytest.approx(result["standard_error"] / math.sqrt(2))


def test_published_averages_are_those_of_the_paper():
    """Table 1 and Fig. 5: the averages of the eight tasks."""
    from doratune.evaluation.published import TASKS, published

    averages = {
        ("LLaMA-7B", "dora", 4): 61.9, ("LLaMA-7B", "dora", 8): 77.9, ("LLaMA-7B", "dora", 32): 78.4,
        ("LLaMA-7B", "lora", 4): 39.5, ("LLaMA2-7B", "dora", 16): 80.5, ("LLaMA3-8B", "dora", 32): 85.2,
    }  # fmt: skip
    for (base, method, rank), average in averages.items():
        figures = [100 * published(base, method, rank, task)[0].accuracy for task in TASKS]
        assert sum(figures) / 8 == pytest.approx(average, abs=0.08)


def test_command_line(tiny_folder, tmp_path, capsys):
    (tmp_path / "mixed.json").write_text(json.dumps(MIXED))
    output = tmp_path / "out"
    task, model = str(tmp_path / "mixed.json"), str(tiny_folder)
    assert main(["evaluate", "--model", model, "--task", task, "--output", str(output), "--max_new_tokens", "4", "--json"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(json.loads(printed[-1])["results"]) == 2
    assert "peak memory" in "\n".join(printed)
    for protocol in ("generate", "likelihood"):
        lines = [json.loads(line) for line in (output / f"mixed.{protocol}.jsonl").read_text().splitlines()]
        assert len(lines) == len(MIXED)
        assert {"prompt", "output", "answer", "gold", "correct"} <= set(lines[0])
    assert main(["evaluate", "--model", model, "--task", task, "--output", str(output)]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m", "--task", "bolq"], "did you mean 'boolq'"),
        (["--model", "m", "--task", ""], "task is not set"),
        (["--task", "boolq"], "neither model nor adapter is set"),
        (["--model", "m", "--task", "x.json", "--batch_size", "0"], "batch_size is 0"),
        (["--task", "x.json", "--protocol", "guess"], "protocol"),
        (["--tsk", "boolq"], "did you mean 'task'"),
        (["--model", "m", "--task", "none.json"], "no such data file"),
        (["--model", "m", "--task", "boolq", "--mirror", "http://127.0.0.1:9"], "cannot be fetched"),
    ],
)
def test_mistakes(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["evaluate", "--output", str(tmp_path / "o"), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_items_that_no_pattern_accepts(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([item(), item("maybe")]))
    with pytest.raises(UserError, match="item 2: answer is 'maybe'"):
        load_task(str(path))
    path.write_text(json.dumps([{"answer": "true"}]))
    with pytest.raises(UserError, match="item 1 has no text under 'instruction'"):
        load_task(str(path))
    path.write_text(json.dumps([item()]))
    with pytest.raises(UserError, match="two tasks are called 't'"):
        load_tasks([str(path), str(path)])


def test_the_published_files_fit_their_patterns(shared_data):
    for path in sorted((shared_data / "commonsense").glob("*/test.json")):
        name, items = load_task(str(path))
        assert name in ANSWERS
        assert all(entry["answer"] in choices(entry) for entry in items)


def test_training_mode_is_given_back(tiny):
    model, tokenizer = tiny
    twin = tiny_llama().train()
    evaluate(twin, tokenizer, [("one", MIXED[:1])], ("likelihood",))
    assert twin.training
