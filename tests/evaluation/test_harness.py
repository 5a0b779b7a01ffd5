"""Tasks of lm-eval over a model with an adapter: a task file of our own, whose figures are known; what is refused."""

import importlib.util
import json

import pytest
import torch
from conftest import tiny_llama

import doratune
from doratune.cli.main import main
from doratune.support.packages import install_line

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TASK = """
task: three_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["true", "false", "option1"]
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def test_without_the_package_there_is_one_line(tiny_folder, tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else there(name, *rest))
    words = ["evaluate", "--model", str(tiny_folder), "--output", str(tmp_path / "out")]
    assert main([*words, "--task", "lm_eval:hellaswag"]) == 2
    assert f"task lm_eval:hellaswag needs lm-eval; run: {install_line('lm_eval')}\n" in capsys.readouterr().err
    assert main([*words, "--task", "[lm_eval:hellaswag, boolq]"]) == 2
    assert "task mixes lm_eval:hellaswag and boolq" in capsys.readouterr().err


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_the_harness_is_scored_with_the_adapter(tiny_folder, tiny_tokenizer, tmp_path, capsys):
    """Its accuracy is the share of items whose right choice has the largest sum of log-probabilities, counted here."""
    model = doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2))
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            layer.lora_B.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    doratune.save(model, tmp_path / "adapter")
    items = [{"question": f"the correct answer {'is ' * (i % 4)}", "label": i % 3} for i in range(9)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "three.yaml").write_text(TASK.replace("FILE", str(tmp_path / "items.jsonl")))
    words = [
        "evaluate",
        "--model",
        str(tiny_folder),
        "--adapter",
        str(tmp_path / "adapter"),
        "--lm_eval_path",
        str(tmp_path / "tasks"),
    ]
    assert main([*words, "--task", "lm_eval:three_choices", "--output", str(tmp_path / "out"), "--batch_size", "4"]) == 0
    assert "three_choices" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    right = 0
    for item in items:
        prompt = tiny_tokenizer(item["question"].rstrip(), add_special_tokens=False)["input_ids"]
        sums = []
        for choice in ("true", "false", "option1"):
            whole = tiny_tokenizer(item["question"] + choice, add_special_tokens=False)["input_ids"]
            start = len(tiny_tokenizer(item["question"], add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(logp[i - 1, whole[i]].item() for i in range(min(start, len(prompt)), len(whole))))
        right += max(range(3), key=sums.__getitem__) == item["label"]
    assert result["total"] == 9 and result["right"] == right
    assert main([*words, "--task", "lm_eval:three_choises", "--output", str(tmp_path / "other")]) == 2
    assert "did you mean 'three_choices'" in capsys.readouterr().err
