"""benchmarks/evaluation.py on a tiny model and a few items; nothing is timed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import randomize, tiny_llama

import doratune


@pytest.fixture
def script(monkeypatch):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "evaluation.py"
    spec = importlib.util.spec_from_file_location("benchmark_evaluation", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tiny_folder, tmp_path):
    """An adapter on the tiny model, and a folder of two tasks of three items."""
    model = randomize(doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj", "v_proj"])))
    model.config._name_or_path = str(tiny_folder)
    doratune.save(model, tmp_path / "adapter")
    for task, answers in (("boolq", ("true", "false")), ("winogrande", ("option1", "option2"))):
        items = [
            {"instruction": f"Is it {'so ' * i}?\n\nAnswer format: {'/'.join(answers)}", "answer": answers[i % 2]} for i in range(3)
        ]
        (tmp_path / "data" / task).mkdir(parents=True)
        (tmp_path / "data" / task / "test.json").write_text(json.dumps(items))
    common = [
        "--adapter",
        tmp_path / "adapter",
        "--model",
        tiny_folder,
        "--data",
        tmp_path / "data",
        "--output",
        tmp_path / "results",
    ]
    return [str(word) for word in common]


def test_both_measurements(script, arguments, tmp_path, capsys):
    script.main([*arguments, "--items", "2", "--chunks", "2", "--protocols", "generate,likelihood,paper"])
    (path,) = (tmp_path / "results").iterdir()
    assert path.name == "evaluation_cpu.json" and capsys.readouterr().out.strip() == str(path)
    text = path.read_text()
    assert "Is it" not in text and str(tmp_path) not in text
    record = json.loads(text)
    assert record["facts"]["settings"]["tasks"] == ["boolq", "winogrande"]
    same, speed = record["result"]["same"], record["result"]["speed"]
    for task in ("boolq", "winogrande"):
        for protocol in ("generate", "likelihood", "paper"):
            found = same[task][protocol]
            assert found["items"] == 2 and found["differing"] == {"correct": 0, "answer": 0, "output": 0}
            assert found["right"]["1"] == found["right"]["32"]
        assert same[task]["likelihood"]["largest_score_difference"] < 1e-3
    assert speed["items"] == 4 and set(speed["times faster than"]) == {"doratune_one", "peft_batches", "peft_one"}
    for arm in speed["arms"].values():
        assert arm["answers_unlike_peft_one"] == 0 and arm["items_per_wall_s"] > 0 and arm["items_per_cpu_s"] > 0
        assert arm["right"] == speed["arms"]["peft_one"]["right"]


def test_one_measurement_on_chosen_tasks(script, arguments, tmp_path):
    script.main([*arguments, "--what", "same", "--tasks", "boolq", "--items", "9", "--batch_size", "2"])
    result = json.loads((tmp_path / "results" / "evaluation_cpu.json").read_text())["result"]
    assert set(result) == {"same"} and set(result["same"]) == {"boolq"}
    assert result["same"]["boolq"]["generate"]["items"] == 3 and "2" in result["same"]["boolq"]["generate"]["right"]


def test_differences_are_counted(script, monkeypatch):
    """Answers that depend on the batch size are seen, by kind of difference."""

    def records(model, tokenizer, name, items, protocol, size):
        return [{"correct": size == 1 or i > 0, "answer": str(size), "output": "x"} for i in range(3)]

    monkeypatch.setattr(script, "records_of", records)
    settings = script.Settings(protocols="generate", batch_size=8)
    found = script.same(None, None, [("t", [{}] * 3)], settings)["t"]["generate"]
    assert found == {"items": 3, "right": {"1": 3, "8": 2}, "differing": {"correct": 1, "answer": 3, "output": 0}}


@pytest.mark.parametrize("wrong", [["--what", "size"], ["--protocols", "guess"], ["--items", "0"]])
def test_mistakes(script, arguments, wrong, capsys):
    with pytest.raises(SystemExit):
        script.main([*arguments, *wrong])
    assert "usage:" in capsys.readouterr().err
