"""Held-out problems: what the training file asks in other case, spaces or punctuation is not held out; nothing else is lost."""

import importlib.util
import json

import pytest


@pytest.fixture
def arithmetic(pytestconfig):
    path = pytestconfig.rootpath / "benchmarks" / "arithmetic.py"
    spec = importlib.util.spec_from_file_location("arithmetic_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_new_problems_are_held_out(arithmetic, tmp_path):
    asked = ["Sam has 3 apples. How many?", "Ann has 4 ."]
    tests = ["sam has 3 apples , how many ?", "Sam has 5 apples. How many?", "ANN HAS 4", "Ann has 44."]
    (tmp_path / "train.json").write_text(json.dumps([{"instruction": text} for text in asked]))
    (tmp_path / "AddSub_test.json").write_text(json.dumps([{"instruction": text, "answer": "1"} for text in tests]))
    assert arithmetic.held_out(tmp_path) == [("AddSub", 4, 2)]
    rest = json.loads((tmp_path / "held_out" / "AddSub.json").read_text())
    assert [item["instruction"] for item in rest] == [tests[1], tests[3]]


def test_the_real_files(arithmetic, shared_data, tmp_path):
    """The counts of docs/arithmetic.md."""
    for path in (shared_data / "math").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert sorted(arithmetic.held_out(tmp_path)) == [
        ("AddSub", 395, 65), ("MultiArith", 600, 109), ("SingleEq", 508, 83), ("gsm8k", 1319, 264), ("svamp", 1000, 200),
    ]  # fmt: skip


def test_tables_of_finished_cells(arithmetic, tmp_path):
    def scored(folder, right):
        folder.mkdir(parents=True)
        result = {"task": "AddSub", "right": right, "total": 20, "unparsable": 0.5, "majority": 0.1, "seconds": 1.0}
        (folder / "results.json").write_text(json.dumps({"results": [result]}))
        records = [json.dumps({"correct": i < right}) for i in range(20)]
        (folder / "AddSub.generate.jsonl").write_text("\n".join(records) + "\n")

    scored(tmp_path / "base", 0)
    scored(tmp_path / "cells" / "lora" / "scores" / "after", 5)
    scored(tmp_path / "cells" / "unfinished" / "scores" / "after", 5)
    (tmp_path / "cells" / "lora" / "metrics.json").write_text(json.dumps({"trainable": 1000, "eval_loss": 0.5, "cpu_seconds": 9}))
    arms = arithmetic.record(tmp_path)
    assert list(arms) == ["base", "lora"]
    assert arms["lora"]["tasks"]["AddSub"]["marks"] == "1" * 5 + "0" * 15
    lines = arithmetic.table(arms).splitlines()
    assert "0/20 (0 – 16 %)" in lines[2] and "5/20 (11 – 47 %)" in lines[3] and "1,000" in lines[3] and "50 %" in lines[3]


def test_scores_without_their_answers_are_one_line(arithmetic, tmp_path):
    result = {"task": "AddSub", "right": 1, "total": 20, "unparsable": 0.5, "majority": 0.1, "seconds": 1.0}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "results.json").write_text(json.dumps({"results": [result]}))
    with pytest.raises(SystemExit, match=r"AddSub\.generate\.jsonl is missing, .*; copy the whole folder"):
        arithmetic.main(["record", str(tmp_path)])


def test_the_mean_of_several_seeds(arithmetic):
    def run(right, loss):
        return {"tasks": {"AddSub": {"right": right, "total": 20}, "gsm8k": {"right": 0, "total": 20}}, "eval_loss": loss}

    arms = {"base": run(1, None), "dora-lr0.1-s0": run(4, 0.5), "dora-lr0.1-s1": run(8, 0.7), "full-s0": run(9, 0.1)}
    lines = arithmetic.over_seeds_table(arms).splitlines()
    assert len(lines) == 3
    assert "dora-lr0.1 | 2 | 15.0 ± 63.5 % | 0.600 ± 1.271" in lines[2]  # t of one degree of freedom: 12.706
    assert arithmetic.over_seeds_table({"base": arms["base"], "full-s0": arms["full-s0"]}) == ""


def test_differences_are_paired_by_problem_and_seed(arithmetic):
    """A method that is right wherever the other is, and on 30 problems more of 100, is better; one that only differs is not."""

    def run(*rights):
        text = "".join("1" if i in set(rights) else "0" for i in range(100))
        tasks = {"gsm8k": {"right": len(rights), "total": 100, "marks": text}}
        return {"tasks": tasks, "eval_loss": None if rights == (0, 1) else 1 + len(rights) / 100 + rights[0] / 10}

    arms = {"base": run(0, 1)}
    for seed in range(3):
        arms[f"lora-s{seed}"] = run(*range(seed, 30 + seed))
        arms[f"dora-s{seed}"] = run(*range(seed, 60 + seed))
        arms[f"other-s{seed}"] = run(*range(29 + seed, 59 + seed))
    lines = {line.split(" | ")[0].strip("| "): line for line in arithmetic.pairs_table(arms).splitlines()[2:]}
    assert set(lines) == {f"{a} - {b}" for a, b in (
        ("lora", "base"), ("dora", "base"), ("other", "base"), ("dora", "lora"), ("other", "lora"), ("other", "dora")
    )}  # fmt: skip
    assert "| +30.0 |" in lines["dora - lora"] and lines["dora - lora"].endswith("| shown | +0.300 (+0.300 to +0.300) |")
    assert "| +0.0 |" in lines["other - lora"] and "| not shown |" in lines["other - lora"]
    assert lines["lora - base"].endswith("| - |")


def test_verdicts_are_by_the_corrected_p(arithmetic, monkeypatch):
    from doratune.comparison import statistics

    def run(*rights):
        text = "".join("1" if i in set(rights) else "0" for i in range(20))
        return {"tasks": {"gsm8k": {"right": len(rights), "total": 20, "marks": text}}}

    monkeypatch.setattr(statistics, "paired_bootstrap", lambda a, b: statistics.Difference(0.1, 0.01, 0.2, 0.03, 0.04, 3))
    arms = {f"{name}-s{seed}": run(seed) for name in ("lora", "dora", "full") for seed in range(3)}
    lines = arithmetic.pairs_table(arms).splitlines()[2:]
    assert len(lines) == 3 and all("| 0.030 | 0.090 |" in line and "| not shown |" in line for line in lines)
    assert arithmetic.pairs_table({"base": run(0), "dora-s0": run(1)}) == ""


def test_a_folder_without_scores_leaves_the_record_as_it_is(arithmetic, tmp_path):
    with pytest.raises(SystemExit, match="holds no scores of a base model or of a finished cell"):
        arithmetic.main(["record", str(tmp_path)])
