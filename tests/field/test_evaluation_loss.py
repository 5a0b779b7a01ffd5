"""The evaluation loss is a mean over tokens: the same at every batch size, number of processes, and for every kind of model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

import doratune
from doratune.data import instruction
from doratune.data.encode import IGNORED, AnswerCollator, encode_all
from doratune.training import TrainerMixin
from doratune.training.token_loss import TokenLoss
from doratune.training.trainer import FullTrainer

SIZES = (1, 4, 7, 30)


class Own(TrainerMixin, Trainer):
    pass


def items(count=30):
    words = ("true", "false, since nobody knows", "a much longer answer that goes on and on " * 3)
    return [{"instruction": f"Is {n} even?" * (n % 4 + 1), "output": words[n % 7 % 3] * (1 + n % 3)} for n in range(count)]


def arguments(folder, batch, **more):
    return TrainingArguments(
        str(folder), per_device_eval_batch_size=batch, report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        remove_unused_columns=False, **more,
    )  # fmt: skip


def rows_of(tokenizer, count=30):
    return encode_all(items(count), instruction.encode, tokenizer, 512)[0]


def exact(model, rows) -> float:
    """The mean over all answer tokens, example by example, in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            labels = torch.tensor(row["labels"])[1:]
            total += F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
            count += (labels != IGNORED).sum().item()
    return total / count


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_same_at_every_batch_size(make, tmp_path, tiny_tokenizer):
    model = make()
    if make is tiny_gpt2:
        model.transformer.wpe = torch.nn.Embedding(512, 32)
    doratune.attach(model, doratune.AdapterConfig(rank=2))
    rows = rows_of(tiny_tokenizer)
    expected = exact(model.eval(), rows)
    for batch in SIZES:
        trainer = Own(model, arguments(tmp_path, batch), data_collator=AnswerCollator(0, model), eval_dataset=rows)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)


def test_full_fine_tuning_and_foreign_collators(tmp_path, tiny_tokenizer):
    """Labels for every token, also the first, and padding on the right."""
    model, rows = tiny_llama(), rows_of(tiny_tokenizer)

    def right(batch):
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch])
        labels = torch.tensor([row["input_ids"] + [IGNORED] * (width - len(row["input_ids"])) for row in batch])
        return {"input_ids": ids, "attention_mask": (labels != IGNORED).long(), "labels": labels}

    expected = exact(model, [row | {"labels": row["input_ids"]} for row in rows])
    for batch in SIZES:
        trainer = FullTrainer(model, arguments(tmp_path, batch), data_collator=right, eval_dataset=rows)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_model_that_does_not_shift(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()

    doratune.attach(model, doratune.AdapterConfig(rank=2))
    rows = [{"input_ids": [5 + n, 6, 7], "labels": list(range(4, 6 + n % 9))} for n in range(13)]

    def collate(batch):
        width = max(len(row["labels"]) for row in batch)
        labels = [row["labels"] + [IGNORED] * (width - len(row["labels"])) for row in batch]
        return {"input_ids": torch.tensor([row["input_ids"] for row in batch]), "labels": torch.tensor(labels)}

    losses = [
        Own(model, arguments(tmp_path, batch), data_collator=collate, eval_dataset=rows).evaluate()["eval_loss"]
        for batch in (1, 4, 13)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_loss_of_its_own_is_weighted_by_tokens():
    """Logits that do not explain the loss, or none: the batch's mean counts for its tokens."""
    labels = torch.tensor([[IGNORED, 1, 2, 3], [IGNORED, IGNORED, IGNORED, 4]])
    for outputs in ({"logits": torch.zeros(2, 4, 9)}, {"logits": None}, (torch.zeros(1),)):
        total = TokenLoss()
        total.add(torch.tensor(5.0), outputs, labels, lambda t: t)
        total.add(torch.tensor(1.0), outputs, labels[:1], lambda t: t)
        assert total.mean() == pytest.approx((4 * 5 + 3 * 1) / 7)
    total = TokenLoss()
    total.add(torch.tensor(5.0), {"logits": torch.zeros(2, 3)}, torch.tensor([0, 1]), lambda t: t)
    assert total.mean() is None  # classes: transformers' own mean stands


PROCESSES = """
import json, sys
import torch
sys.path[:0] = json.loads(sys.argv[2])
from conftest import tiny_llama
import test_evaluation_loss as own
rows = json.load(open(sys.argv[1]))
model = tiny_llama()
own.doratune.attach(model, own.doratune.AdapterConfig(rank=2))
for batch in (1, 4, 7):
    arguments = own.arguments(sys.argv[3], batch)
    trainer = own.Own(model, arguments, data_collator=own.AnswerCollator(0, model), eval_dataset=rows)
    loss = trainer.evaluate()["eval_loss"]
    if arguments.process_index == 0:
        print(json.dumps([arguments.world_size, batch, loss]), flush=True)
"""


def test_the_same_on_several_processes(tmp_path, tiny_tokenizer):
    """30 rows on two processes: the last batches are filled up with repeated rows, which do not count."""
    rows = rows_of(tiny_tokenizer, 29)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "run.py").write_text(PROCESSES)
    here = os.path.dirname(__file__)
    words = [str(tmp_path / "rows.json"), json.dumps([here, os.path.dirname(here)]), str(tmp_path / "out")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "run.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([*launch, *words], capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    printed = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    expected = exact(tiny_llama(), rows)
    assert [(size, batch) for size, batch, _ in printed] == [(2, 1), (2, 4), (2, 7)]
    assert [loss for *_, loss in printed] == pytest.approx([expected] * 3, rel=1e-6)


def test_trl(tmp_path, tiny_tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class OwnSFT(TrainerMixin, trl.SFTTrainer):
        pass

    pairs = [{"prompt": instruction.prompt_of(item), "completion": item["output"]} for item in items(13)]
    losses = []
    for batch in (1, 4, 13):
        model = tiny_llama()
        doratune.attach(model, doratune.AdapterConfig(rank=2))
        settings = trl.SFTConfig(
            str(tmp_path), per_device_eval_batch_size=batch, report_to=[], use_cpu=True, dataloader_pin_memory=False, bf16=False,
            disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        data = Dataset.from_list(pairs)
        trainer = OwnSFT(model, settings, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
