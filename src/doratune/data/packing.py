"""Packing: several examples in one row, none of which sees another, so that nothing is padding.

Each example keeps its own positions, 0, 1, 2, …, and transformers makes from where they restart the mask of the attention: blocks
for SDPA, eager and flex, lengths for FlashAttention (which wants all rows in one; `DataCollatorWithFlattening`). Whether a model
does so is asked of the model (`training/packing.py`). Which examples share a row: best fit, the longest first (Johnson 1973).

The loss is the mean over all answer tokens, as without packing. Cost: one sort; of the attention, the masked part of each row.
"""

from __future__ import annotations

import bisect
import inspect
import random
from collections.abc import Sequence

import torch

from .encode import IGNORED, AnswerCollator

PACKED = "packed"
"""Key of a batch whose mask is for counting alone: a model must not get it, since positions say what sees what."""


def pack(rows: Sequence[dict], length: int, seed: int = 0) -> list[dict]:
    """Rows of at most `length` tokens, each with the examples that it holds.

    Args:
        rows: {input_ids, labels, length} of each example. seed: for the order of examples of one length.

    Returns:
        {input_ids, labels, length, lengths} of each row; `lengths` are those of its examples.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -rows[i]["length"])
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that are free, bin), in order
    for i in order:
        place = bisect.bisect_left(rooms, (rows[i]["length"], -1))
        room, number = rooms.pop(place) if place < len(rooms) else (length, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(i)
        bisect.insort(rooms, (room - rows[i]["length"], number))
    return [_joined([rows[i] for i in one]) for one in bins]


def _joined(examples: Sequence[dict]) -> dict:
    ids = [token for one in examples for token in one["input_ids"]]
    labels = [label for one in examples for label in (IGNORED, *one["labels"][1:])]  # nothing predicts an example's first token
    return {"input_ids": ids, "labels": labels, "length": len(ids), "lengths": [one["length"] for one in examples]}


def examples_of(rows: Sequence[dict]) -> int:
    """How many examples the rows hold, packed or not."""
    return sum(len(row.get("lengths", (0,))) for row in rows)


class PackingCollator:
    """Batches of packed rows; rows that are not packed (those of an evaluation) go through `AnswerCollator`.

    Returns input_ids, position_ids (N, T), attention_mask for counting tokens, labels, `packed`; where the model can, labels and
    logits at the positions that have a loss in any row. Under FlashAttention all rows are one: (1, all tokens)."""

    def __init__(self, pad_token_id: int, model):
        self.pad, self.single = pad_token_id, AnswerCollator(pad_token_id, model)
        self.flat = _is_flash(model)
        accepted = inspect.signature(model.forward).parameters
        # with a cache of keys and values transformers takes a row for one sequence, whatever its positions are
        self.settings = {PACKED: True} | ({"use_cache": False} if "use_cache" in accepted else {})
        # an index of positions is no tensor to split among the devices of one process
        self.indexed = "logits_to_keep" in accepted and torch.cuda.device_count() < 2

    def __call__(self, rows: list[dict]) -> dict:
        if not all("lengths" in row for row in rows):
            return self.single(rows)
        rows = [_concatenated(rows)] if self.flat else rows
        width = max(row["length"] for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask, labels, positions = torch.zeros_like(ids), torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            end = row["length"]
            ids[i, :end], mask[i, :end], labels[i, :end] = torch.tensor(row["input_ids"]), 1, torch.tensor(row["labels"])
            positions[i, :end] = torch.cat([torch.arange(n) for n in row["lengths"]])
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | self.settings
        if self.indexed:
            needed = (labels != IGNORED).any(0)
            needed[:-1] |= needed[1:].clone()  # the position that predicts a label stands in front of it
            batch["logits_to_keep"] = kept = needed.nonzero().flatten()
            labels = labels[:, kept]
        return batch | {"labels": labels}


def _concatenated(rows: Sequence[dict]) -> dict:
    names = ("input_ids", "labels", "lengths")
    return {name: [value for row in rows for value in row[name]] for name in names} | {"length": sum(row["length"] for row in rows)}


def _is_flash(model) -> bool:
    """Does the model's attention take the examples of a batch in one row, by their lengths?"""
    from transformers.utils.generic import is_flash_attention_requested

    return is_flash_attention_requested(model.config)


def without_mask(batch: dict) -> dict:
    """What a model gets of a batch: of a packed one not the mask, which would stand for the whole row."""
    return {k: v for k, v in batch.items() if k not in (PACKED, "attention_mask")} if batch.get(PACKED) is True else batch
