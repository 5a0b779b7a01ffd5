"""From examples to batches: what is answer and what is prompt, what happens to an example that is too long, padding.

Batches are padded on the left, so that all answers end in the last column and the output head needs to run on the last
few positions only (`logits_to_keep`): with a vocabulary of 49,152 that is a fifth of a small model's training step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import UserError

IGNORED = -100


class Encoded(NamedTuple):
    """One example: token ids, which of them are answer, and where the last answer starts."""

    ids: list[int]
    answer: list[bool]
    last_answer: int


@dataclass
class LengthReport:
    """What the length limit did to a data set."""

    examples: int = 0
    cut: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        if not self.cut and not self.skipped:
            return f"{self.examples} examples, none too long"
        return f"{self.examples} examples: {self.cut} cut on the prompt's left, {self.skipped} skipped as too long"


def fit(example: Encoded, max_length: int, too_long: str, bos: int | None) -> Encoded | None:
    """The example within max_length tokens, its last answer whole; None where it must be skipped.

    A beginning-of-sequence token in front survives the cut."""
    excess = len(example.ids) - max_length
    if excess <= 0:
        return example
    head = 1 if example.ids[0] == bos else 0
    room = example.last_answer - head - 1  # at least one token of the prompt stays
    if too_long == "skip" or excess > room:
        return None
    ids = example.ids[:head] + example.ids[head + excess :]
    answer = example.answer[:head] + example.answer[head + excess :]
    return Encoded(ids, answer, example.last_answer - excess)


def encode_all(items: Sequence, encode, tokenizer, max_length: int, too_long: str = "cut", on_prompt: bool = False):
    """([{input_ids, labels, length}], LengthReport) for a list of checked items.

    Raises:
        UserError: no example fits.
    """
    report, rows = LengthReport(len(items)), []
    for item in items:
        whole = encode(item, tokenizer)
        example = fit(whole, max_length, too_long, tokenizer.bos_token_id)
        if example is None:
            report.skipped += 1
            continue
        report.cut += len(example.ids) < len(whole.ids)
        labels = [i if a or on_prompt else IGNORED for i, a in zip(example.ids, example.answer)]
        rows.append({"input_ids": example.ids, "labels": labels, "length": len(labels)})
    if not rows:
        raise UserError(f"all {len(items)} examples are longer than max_length {max_length}; raise max_length")
    return rows, report


class AnswerCollator:
    """Left-padded batches; where the model can, labels and logits of the last positions only.

    Returns input_ids, attention_mask, position_ids (T), labels (the last `logits_to_keep` columns)."""

    def __init__(self, pad_token_id: int, model):
        self.pad = pad_token_id
        accepted = inspect.signature(model.forward).parameters
        self.keeps_logits = "logits_to_keep" in accepted
        self.positions = "position_ids" in accepted

    def __call__(self, rows: list[dict]) -> dict:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            start = width - len(row["input_ids"])
            ids[i, start:], mask[i, start:] = torch.tensor(row["input_ids"]), 1
            labels[i, start:] = torch.tensor(row["labels"])
            labels[i, start] = IGNORED  # nothing predicts the first token
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.positions:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        keep = width
        if self.keeps_logits:
            keep = min(width, width - int((labels != IGNORED).any(0).nonzero()[0]) + 1)
            batch["logits_to_keep"] = keep
        return batch | {"labels": labels[:, width - keep :]}
