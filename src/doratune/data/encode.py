"""From examples to batches: what is answer and what is prompt, what happens to an example that is too long, padding.

A token is answer if it holds any character of an answer: also one that merges the prompt's last character with the answer's
first. Batches are padded on the left, so that all answers end in the last column and the output head needs to run on the last
few positions only (`logits_to_keep`): with a vocabulary of 49,152 that is a fifth of a small model's training step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..errors import UserError
from .files import placed

IGNORED = -100


class Encoded(NamedTuple):
    """One example: token ids, which of them are answer, where the last answer starts, and whether it may be divided into several
    examples (a plain text) instead of being cut; its images, and which tokens are theirs."""

    ids: list[int]
    answer: list[bool]
    last_answer: int
    divisible: bool = False
    images: tuple = ()
    of_image: Sequence[bool] = ()

    @classmethod
    def of_mask(cls, ids: list[int], answer: list[bool]) -> Encoded:
        """The last answer is the last unbroken run of answer tokens.

        Raises:
            UserError: no token is answer.
        """
        starts = [i for i, a in enumerate(answer) if a and (i == 0 or not answer[i - 1])]
        if not starts:
            raise UserError("no token of it is answer, so there is nothing to learn")
        return cls(list(ids), answer, starts[-1])


@dataclass
class DataReport:
    """What the length limit did to a data set, and which of its items could not be used."""

    examples: int = 0
    cut: int = 0
    skipped: int = 0
    divided: int = 0
    unusable: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.examples} examples"
        text += f": {self.cut} cut on the prompt's left, {self.skipped} skipped as too long" if self.cut or self.skipped else ""
        text += "" if self.cut or self.skipped else ", none too long"
        text += f"; {self.divided} texts divided into examples of that length" if self.divided else ""
        if self.unusable:
            text += f"; {len(self.unusable)} unusable items skipped (the first: {self.unusable[0]})"
        return text

    def counts(self) -> dict[str, int]:
        return {"examples": self.examples, "cut": self.cut, "too_long": self.skipped, "unusable": len(self.unusable)}


def encoded(tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> Encoded:
    """The tokens of a text, answer where they hold a character of a span; spans in order, (first, behind the last).

    A tokenizer without offsets (a slow one) is asked for the tokens of the text up to each border: what they share with the
    tokens of the whole text lies before the border, the next token holds it.
    """
    if not tokenizer.is_fast:
        return _encoded_by_prefix(tokenizer, text, spans)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    answer, first, behind = [], [], 0
    for start, end in whole["offset_mapping"]:
        start = behind if start == end else start  # white space that a tokenizer trims off its offsets
        behind = max(behind, end)
        answer.append(any(start < last and end > begin for begin, last in spans))
        first.append(end > spans[-1][0])
    return Encoded(list(whole["input_ids"]), answer, first.index(True) if True in first else len(answer))


def _encoded_by_prefix(tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> Encoded:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def border(position: int, after: bool) -> int:
        part = tokenizer(text[:position], add_special_tokens=False)["input_ids"]
        same = next((i for i, (a, b) in enumerate(zip(part, ids)) if a != b), min(len(part), len(ids)))
        return min(len(ids), same + (after and same < len(part)))

    answer, start = [False] * len(ids), 0
    for begin, last in spans:
        start, end = border(begin, False), border(last, True)
        answer[start:end] = [True] * (end - start)
    return Encoded(ids, answer, start)


def fit(example: Encoded, max_length: int, too_long: str, bos: int | None) -> Encoded | None:
    """The example within max_length tokens, its last answer whole; None where it must be skipped.

    A beginning-of-sequence token in front survives the cut."""
    excess = len(example.ids) - max_length
    if excess <= 0:
        return example
    head = 1 if example.ids[0] == bos else 0
    room = example.last_answer - head - 1 - sum(example.of_image)  # at least one token of the prompt stays
    if too_long == "skip" or excess > room:
        return None
    if example.images:
        return _without(example, excess, head)
    ids = example.ids[:head] + example.ids[head + excess :]
    answer = example.answer[:head] + example.answer[head + excess :]
    return Encoded(ids, answer, example.last_answer - excess)


def _without(example: Encoded, excess: int, head: int) -> Encoded:
    """The example without the first tokens of its prompt behind `head` that are no image's."""
    words = [i for i in range(head, example.last_answer) if not example.of_image[i]][:excess]
    stays = sorted(set(range(len(example.ids))) - set(words))
    ids, answer, of_image = ([part[i] for i in stays] for part in (example.ids, example.answer, example.of_image))
    return Encoded(ids, answer, example.last_answer - excess, False, example.images, of_image)


def encode_all(
    items: Sequence,
    encode,
    tokenizer,
    max_length: int,
    too_long: str = "cut",
    on_prompt: bool = False,
    unusable: list[str] | None = None,
):
    """([{input_ids, labels, length}], DataReport) for a list of checked items.

    Args:
        unusable: takes a line for each item whose template or tokenizer fails, and the item is skipped; None: the first stops.

    Raises:
        UserError: no example fits, or an item that cannot be tokenized or masked.
    """
    report = DataReport()
    rows = list(encode_each(items, encode, tokenizer, max_length, too_long, on_prompt, unusable, report))
    if not rows and report.skipped:
        raise UserError(f"all {len(items)} examples are longer than max_length {max_length}; raise max_length")
    if not rows:
        raise UserError(f"none of {len(items)} items can be used; the first: {report.unusable[0]}")
    return rows, report


def encode_each(
    items: Iterable,
    encode,
    tokenizer,
    max_length: int,
    too_long: str,
    on_prompt: bool,
    unusable: list[str] | None,
    report: DataReport,
) -> Iterator[dict]:
    """{input_ids, labels, length} of each item that can be used, one after the other, counted in `report`; see `encode_all`."""
    report.unusable = [] if unusable is None else unusable
    for number, item in enumerate(items, 1):
        try:
            whole = encode_one(item, encode, tokenizer, number)
        except UserError as error:
            if unusable is None:
                raise
            unusable.append(str(error))
            continue
        report.examples += 1
        examples = fitting(whole, max_length, too_long, tokenizer.bos_token_id)
        report.skipped += not examples
        report.divided += len(examples) > 1
        report.cut += len(examples) == 1 and len(examples[0].ids) < len(whole.ids)
        for example in examples:
            labels = [i if a or on_prompt else IGNORED for i, a in zip(example.ids, example.answer)]
            row = {"input_ids": example.ids, "labels": labels, "length": len(labels)}
            yield row | {"images": example.images} if example.images else row


def fitting(example: Encoded, max_length: int, too_long: str, bos: int | None) -> list[Encoded]:
    """An example within max_length tokens, several where it may be divided; none where it must be skipped."""
    if example.divisible and too_long == "cut" and len(example.ids) > max_length:
        starts = [i for i in range(0, len(example.ids), max_length) if len(example.ids) - i > 1]  # one token alone predicts nothing
        return [Encoded(example.ids[i : i + max_length], example.answer[i : i + max_length], 0, True) for i in starts]
    one = fit(example, max_length, too_long, bos)
    return [] if one is None else [one]


def encode_one(item, encode, tokenizer, number: int = 1) -> Encoded:
    """The tokens of one item; whatever fails in a template or a tokenizer is a UserError that begins with the item's place."""
    where = getattr(item, "where", f"item {number}")
    try:
        example = encode(item, tokenizer)
    except UserError as error:
        raise UserError(placed(f"{where}: {error}", item)) from None
    except Exception as error:  # a template or a tokenizer is a program of others: jinja2's, Rust's and Python's own types
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        problem = (
            f"{where} cannot be put into tokens ({type(error).__name__}: {reason[:200]}); mend or remove it, or set bad_items: skip"
        )
        raise UserError(placed(problem, item)) from None
    if not any(example.answer[1:]):
        problem = f"{where}: no token of it is answer, so there is nothing to learn; remove it, or set bad_items: skip"
        raise UserError(placed(problem, item))
    return example


def prompt_ids(example: Encoded, tokenizer) -> list[int]:
    """The tokens in front of the last answer; of a plain text, which has no answer, all but what closes it."""
    if not example.divisible:
        return example.ids[: example.last_answer]
    return example.ids[:-1] if example.ids[-1] == tokenizer.eos_token_id else example.ids


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
