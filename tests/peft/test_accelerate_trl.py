"""TRL's trainers with an accelerated DoRA model: the curves of the same run by PEFT alone.

`DORATUNE_SFT_STEPS=1000 pytest tests/peft/test_accelerate_trl.py` is the long form; what it gave is in docs/peft.md.
"""

import math
import os

import peft
import pytest
import torch
from accelerated import error, ways
from conftest import tiny_llama
from datasets import Dataset

import doratune

trl = pytest.importorskip("trl")

STEPS = int(os.environ.get("DORATUNE_SFT_STEPS", "20"))
DORA = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
WORDS = ["answer", "correct", "true", "false", "solution", "option", "ending", "the", "is"]


def sentences(count):
    return [" ".join(WORDS[(i * step + 2) % 9] for step in range(3, 9)) for i in range(count)]


def settings(cls, folder, **more):
    return cls(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=1, report_to=[], use_cpu=True, learning_rate=2e-3,
        dataloader_pin_memory=False, disable_tqdm=True, bf16=False, logging_steps=1, save_strategy="no", **more,
    )  # fmt: skip


def smooth(losses, width=100):
    """Means over so many steps."""
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    return [sum(part) / len(part) for part in parts]


def curve(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_sft_has_the_same_loss_curve(dropout, tmp_path, tiny_tokenizer):
    rows = Dataset.from_list([{"prompt": f"{text} ", "completion": text[:12]} for text in sentences(30)])
    curves, models = [], []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**DORA, lora_dropout=dropout))
        args = settings(trl.SFTConfig, tmp_path / str(accelerated), max_steps=STEPS)
        trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tiny_tokenizer)
        if accelerated:
            assert len(doratune.peft.accelerate(trainer.model).layers) == 14
        curves.append(curve(trainer))
        trainer.save_model()
        models.append(trainer.model)
    print(f"largest difference of {len(curves[0])} losses: {max(abs(a - b) for a, b in zip(*curves, strict=True)):.1e}")
    assert len(curves[0]) == STEPS and curves[0][-1] < curves[0][0]
    assert curves[1][:200] == pytest.approx(curves[0][:200], abs=2e-3)
    # from some hundreds of steps on, roundings have grown into single losses; the curve is the same
    assert smooth(curves[1]) == pytest.approx(smooth(curves[0]), abs=3e-3)
    assert min(ways(models[1])) > STEPS
    saved = [peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / str(accelerated)) for accelerated in (False, True)]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        theirs, ours = (model(input_ids=ids).logits for model in saved)
        assert error(ours, models[1].eval()(input_ids=ids).logits) < 1e-5
        assert error(ours, theirs) < (1e-2 if STEPS <= 100 else 0.3)


def test_dpo_takes_the_disabled_adapter_for_reference(tmp_path, tiny_tokenizer):
    rows = Dataset.from_list([{"prompt": f"{text} ", "chosen": text[:12], "rejected": text[12:20]} for text in sentences(16)])
    curves = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        args = settings(trl.DPOConfig, tmp_path, max_steps=4)
        trainer = trl.DPOTrainer(
            tiny_llama(), args=args, train_dataset=rows, processing_class=tiny_tokenizer, peft_config=peft.LoraConfig(**DORA)
        )
        if accelerated:
            doratune.peft.accelerate(trainer.model)
        curves.append(curve(trainer))
    assert curves[0][0] == pytest.approx(math.log(2), abs=1e-4)
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)
    assert curves[1][-1] < curves[1][0]
