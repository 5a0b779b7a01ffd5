"""The way of preference pairs into TRL's DPOTrainer, as docs/data.md gives it: at the start the model is its own reference."""

import json

import pytest
import torch
from conftest import tiny_llama

import doratune
from doratune.data import preference_pairs
from doratune.errors import UserError
from doratune.training import TrainerMixin

PAIRS = [
    {"prompt": "Is it true?", "chosen": "the correct answer is true", "rejected": "false"},
    {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "one"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "true"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "false"}],
    },
]


def test_every_layout_becomes_one(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(pair) for pair in PAIRS))
    rows = preference_pairs(str(path))
    assert [row["prompt"][-1] for row in rows] == [{"role": "user", "content": text} for text in ("Is it true?", "hi", "a")]
    assert [[m["role"] for m in row["chosen"] + row["rejected"]] for row in rows] == [["assistant"] * 2] * 3
    assert [row["rejected"][0]["content"] for row in rows] == ["false", "no", "false"]
    path.write_text(json.dumps({"instruction": "a", "output": "b"}))
    with pytest.raises(UserError, match="holds instruction data"):
        preference_pairs(str(path))


def trained(rows, tokenizer, folder):
    """Eight steps of DPO; the margins between chosen and rejected, and the trainer."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class DoRADPO(TrainerMixin, trl.DPOTrainer):
        pass

    model = tiny_llama()
    doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["q_proj", "v_proj", "down_proj"]))
    settings = trl.DPOConfig(
        output_dir=str(folder), precompute_ref_log_probs=True, per_device_train_batch_size=2, max_steps=8, learning_rate=1e-2,
        max_length=128, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DoRADPO(model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], trainer


@pytest.mark.filterwarnings("ignore")
def test_pairs_train_an_adapter_through_trl(tiny_tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(pair) for pair in PAIRS * 4))
    log, trainer = trained(preference_pairs(str(path)), tiny_tokenizer, tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-4)  # at the start no margin: log 2
    assert log[-1]["loss"] < log[0]["loss"] - 0.01 and log[-1]["rewards/margins"] > 0
    doratune.save(trainer.model, tmp_path / "adapter")
    assert doratune.load(tiny_llama(), tmp_path / "adapter") is not None


@pytest.mark.filterwarnings("ignore")
def test_the_real_pairs_go_the_same_way(tiny_tokenizer, tmp_path, shared_data):
    path = shared_data / "instruct" / "dpo_en_demo.json"
    if not path.is_file():
        pytest.skip("the instruction sets are not on this machine")
    rows = preference_pairs(f"{path}[:12]")
    log, _ = trained(rows, tiny_tokenizer, tmp_path / "run")
    assert all(torch.tensor(row["loss"]).isfinite() for row in log) and len(log) == 8
