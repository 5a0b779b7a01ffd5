"""A data set as a model will see it: lengths in tokens, what the limit cuts or skips, items that are wrong, odd or double.

Everything goes through what training goes through, item by item, so that what is said here is what a run does. Cost: the rendering
and tokenization of each item once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import UserError
from .encode import Encoded, encode_one, fitting
from .files import Item, placed
from .formats import DataFormat
from .leakage import TestQuestions
from .settings import DataSettings

PERCENTILES = (1, 10, 25, 50, 75, 90, 95, 99)


class TokenCount(NamedTuple):
    """Tokens of a part of an item (an example, or one side of a pair)."""

    tokens: int
    learned: int


@dataclass
class Survey:
    """What there is to say of a data set. Lines begin with the place of their item.

    Attributes:
        sizes: of each part that can be used. fits: counts of parts that stay whole, are cut, divided or skipped at max_length.
        unusable, odd, double, leaked: a line for each item. clean: the items that are none of unusable, double and leaked.
        shown: the first usable items, with their parts.
    """

    sizes: list[TokenCount] = field(default_factory=list)
    fits: dict[str, int] = field(default_factory=lambda: {"whole": 0, "cut": 0, "divided": 0, "skipped": 0})
    unusable: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    double: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    clean: list[Item] = field(default_factory=list)
    shown: list[tuple[Item, list[tuple[str, Encoded]]]] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        lists = {name: len(getattr(self, name)) for name in ("unusable", "odd", "double", "leaked", "clean")}
        return lists | {"examples": len(self.sizes)} | self.fits


def survey(
    items: Iterable[Item],
    kind: DataFormat,
    tokenizer,
    settings: DataSettings,
    max_length: int,
    too_long: str = "cut",
    show: int = 3,
    test: TestQuestions | None = None,
    unusable: Sequence[str] = (),
) -> Survey:
    """Look at every item.

    Args:
        show: how many items are kept with their tokens. test: the questions of a test set. unusable: lines of items that are not
            among these, because their form is wrong already.
    """
    found, seen, asked = Survey(unusable=list(unusable)), {}, {}
    for item in items:
        parts, problem = _parts(item, kind, tokenizer, settings)
        if problem:
            found.unusable.append(problem)
            continue
        if len(found.shown) < show:
            found.shown.append((item, parts))
        for _, example in parts:
            found.sizes.append(TokenCount(len(example.ids), sum(example.answer)))
            found.fits[_fit(example, max_length, too_long, tokenizer.bos_token_id)] += 1
        question = kind.question(item, settings)
        found.odd += [placed(f"{item.where} {note}", item) for note in kind.odd(item, settings)]
        tokens = tuple(tuple(example.ids) for _, example in parts)
        first, before = seen.setdefault(hash(tokens), item), asked.setdefault(hash(question), item)
        met = test.met_by(question) if test is not None else None
        if first is not item:
            found.double.append(placed(f"{item.where} is {_short(first)} again", item))
        elif before is not item:
            found.odd.append(placed(f"{item.where} asks what {_short(before)} asks, and has another answer", item))
        if met is not None:
            found.leaked.append(placed(f"{item.where} asks {met[0]} as {met[1]} of the test", item))
        if first is item and met is None:
            found.clean.append(item)
    return found


def _parts(item: Item, kind: DataFormat, tokenizer, settings: DataSettings) -> tuple[list[tuple[str, Encoded]], str | None]:
    """(parts of the item, or why it has none)."""
    parts: list[tuple[str, Encoded]] = []

    def encode(item, tokenizer) -> Encoded:
        parts.extend(kind.parts(item, tokenizer, settings))
        return parts[0][1]

    try:
        encode_one(item, encode, tokenizer)
    except UserError as error:
        return [], str(error)
    return parts, None


def _fit(example: Encoded, max_length: int, too_long: str, bos: int | None) -> str:
    examples = fitting(example, max_length, too_long, bos)
    if not examples:
        return "skipped"
    return "divided" if len(examples) > 1 else "whole" if len(examples[0].ids) == len(example.ids) else "cut"


def _short(item: Item) -> str:
    """`item 3`: the place without the file."""
    return item.where.rpartition(": ")[2]


def percentile(values: Sequence[int], share: float) -> int:
    """The smallest value that `share` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]
