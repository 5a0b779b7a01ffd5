"""benchmarks/accelerated_peft.py on a tiny shape, and what its committed figures say; nothing is timed here."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script():
    path = ROOT / "benchmarks" / "accelerated_peft.py"
    spec = importlib.util.spec_from_file_location("benchmark_accelerated_peft", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_measurements(script, tmp_path, monkeypatch):
    words = ["--model", "tiny-shape", "--dtypes", "float32", "--rounds", "1", "--new_tokens", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["accelerated_peft.py", *words])
    script.main()
    found = json.loads((tmp_path / "accelerated_peft_cpu_float32.json").read_text())["result"]["float32"]
    assert set(found) == {"train_step", "train_step, dropout 0.05", "decode"}
    for measured in found.values():
        assert set(measured["arms"]) == {"frozen", "dora_peft", "accelerated_peft"}
        assert measured["ratios"]


def test_the_docs_say_what_was_measured():
    text = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "accelerated_peft_cpu_bfloat16.json").read_text())["result"]["bfloat16"]

    def ratio(what, name):
        return result[what]["ratios"][name]["wall_s"]["p50"]

    beyond = "(accelerated_peft-frozen)/(dora_peft-frozen)"
    rows = {
        "what DoRA adds to the frozen base's training step": f"{ratio('train_step', beyond):.2f}",
        "the same with `lora_dropout=0.05`, beyond the frozen base": f"{ratio('train_step, dropout 0.05', beyond):.2f}",
        "greedy decode, unmerged": f"{ratio('decode', 'dora_peft/accelerated_peft'):.1f} × faster",
    }
    for row, figure in rows.items():
        assert f"| {row} | 1 | {figure} |" in text
