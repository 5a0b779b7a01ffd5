"""Items of image and video tasks as VL-BART reads them: features in front, a prefix and a question, an answer to be learned.

    encoder   [features of the first image ; of the second ; <s> task: context question </s>]
    labels    [<s> answer </s>], as BART was pretrained

A text longer than max_length loses the beginning of its context, then of its question: never the task's prefix. Of a caption's item
each caption is a row; of several people's answers one is drawn with the seed, as often as people gave it. Cost: tokenizing a row
and reading its features each time it is seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..data.encode import IGNORED
from ..data.visual_features.extract import Features
from ..data.visual_tasks import VisualItem, tasks
from .task_order import TaskOrder


@dataclass(frozen=True)
class SeenItem:
    """An item and where its features are."""

    item: VisualItem
    features: Features

    def inputs(self) -> tuple[Tensor, Tensor]:
        """((N, S) features, (N, 2) number of the image and of the cell or frame)."""
        parts = [self.features[sight] for sight in self.item.sights]
        places = [torch.stack([torch.full((len(part),), j), torch.arange(len(part))], 1) for j, part in enumerate(parts)]
        return torch.cat(parts), torch.cat(places)


class VisualRows(Dataset):
    """{input_ids, labels, visual_features (N, S), visual_places (N, 2)} of each row.

    Args:
        rows: an item and the answer to be learned of it.
    """

    def __init__(self, rows: Sequence[tuple[SeenItem, str]], tokenizer, max_length: int):
        self.rows, self.tokenizer, self.max_length = list(rows), tokenizer, max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        seen, answer = self.rows[index]
        features, places = seen.inputs()
        ids = prompt_ids(seen.item, self.tokenizer, self.max_length)
        return {"input_ids": ids, "labels": _closed(answer, self.tokenizer), "visual_features": features, "visual_places": places}

    def order(self, batch_size: int, seed: int) -> TaskOrder:
        """In which a run sees the rows."""
        return TaskOrder([seen.item.task for seen, _ in self.rows], batch_size, seed)


def training_rows(seen: Sequence[SeenItem], seed: int) -> list[tuple[SeenItem, str]]:
    """(item, answer to be learned): every caption of an item, else one of its answers."""
    rows = []
    for one in seen:
        if tasks()[one.item.task].scored == "caption":
            rows += [(one, answer) for answer in one.item.answers]
        else:
            rows.append((one, random.Random(f"{seed} {one.item.task} {one.item.name}").choice(one.item.answers)))
    return rows


def prompt_ids(item: VisualItem, tokenizer, max_length: int) -> list[int]:
    """The tokens of an item's text, at most max_length."""
    first, last = _edges(tokenizer)
    prefix = _tokens(f"{item.task}:", tokenizer)
    context = _tokens(f" {item.context}", tokenizer) if item.context else []
    question = _tokens(f" {item.question}", tokenizer) if item.question else []
    room = max(0, max_length - len(first) - len(prefix) - len(last))
    question = question[max(0, len(question) - room) :]
    context = context[max(0, len(context) - (room - len(question))) :]
    return [*first, *prefix, *context, *question, *last]


def _closed(text: str, tokenizer) -> list[int]:
    first, last = _edges(tokenizer)
    return [*first, *_tokens(text, tokenizer), *last]


def _tokens(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _edges(tokenizer) -> tuple[list[int], list[int]]:
    """What BART's texts begin and end with."""
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [], [tokenizer.eos_token_id]


class VisualCollator:
    """Batches: text and features padded on the right, one mask over both, the answer shifted for the decoder.

    Args:
        start: the token that BART's decoder begins with.
    """

    def __init__(self, pad: int, start: int):
        self.pad, self.start = pad, start

    def __call__(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        batch = self.inputs(rows)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], True, IGNORED)
        shifted = labels.roll(1, 1).masked_fill(labels.roll(1, 1) == IGNORED, self.pad)
        shifted[:, 0] = self.start
        return batch | {"labels": labels, "decoder_input_ids": shifted}

    def inputs(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        """input_ids (B, T), visual_features (B, N, S), visual_places (B, N, 2), attention_mask (B, N + T)."""
        texts = [torch.tensor(row["input_ids"]) for row in rows]
        features = [row["visual_features"] for row in rows]
        masks = [pad_sequence([torch.ones(len(part), dtype=torch.long) for part in parts], True) for parts in (features, texts)]
        return {
            "input_ids": pad_sequence(texts, True, self.pad),
            "visual_features": pad_sequence(features, True),
            "visual_places": pad_sequence([row["visual_places"] for row in rows], True),
            "attention_mask": torch.cat(masks, 1),
        }
