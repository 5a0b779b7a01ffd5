"""What a start asks of a data set: how many examples, how long; by what `doratune data` shows (`data/survey.py`).

Cost: the tokenization of at most LOOKED_AT items.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Sequence

from ..data import DataSettings, encoder
from ..data.files import Item
from ..data.formats import DataFormat
from ..data.survey import percentile, survey
from ..errors import UserError
from .start import DataFacts

LOOKED_AT = 5000
"""Of more items, so many are drawn."""
USUAL_SHARE = 99
TEXT_LENGTH = 1024
"""Tokens of an example of plain text, which is divided at this length."""


def data_facts(items: Sequence[Item], kind: DataFormat, tokenizer, reading: DataSettings, unusable: list[str]) -> DataFacts:
    """How many examples the items are, and how long.

    Args:
        unusable: takes a line for each item that cannot be put into tokens.

    Raises:
        UserError: no item can be used, or the format is none that training learns from.
    """
    encoder(kind, reading)
    drawn = items if len(items) <= LOOKED_AT else random.Random(0).sample(list(items), LOOKED_AT)
    found = survey(drawn, kind, tokenizer, reading, 2**31 - 1, show=1)
    unusable += found.unusable
    if not found.sizes:
        raise UserError(f"no item can be used; the first: {unusable[0]}")
    tokens = [size.tokens for size in found.sizes]
    usual, longest = percentile(tokens, USUAL_SHARE), max(tokens)
    share = len(items) / len(drawn)
    if found.shown[0][1][0][1].divisible and usual > TEXT_LENGTH:
        return DataFacts(math.ceil(share * sum(tokens) / TEXT_LENGTH), TEXT_LENGTH, longest, divided=True)
    return DataFacts(round(share * len(tokens)), usual, longest, images=_most_images(drawn, kind, reading))


def _most_images(items: Sequence[Item], kind: DataFormat, reading: DataSettings) -> int:
    """Images in the item that has most."""
    most = 0
    for item in items if kind.sees else ():
        with contextlib.suppress(UserError):  # said of the item already
            most = max(most, len(kind.sources(item, reading)))
    return most


def in_the_template(item: Item, kind: DataFormat, tokenizer, reading: DataSettings) -> bool:
    """Would `prompt: template` change what the model sees of an item, and can this tokenizer do it?"""
    if not tokenizer.chat_template or reading.prompt != "plain":
        return False
    try:
        plain, templated = (kind.encode(item, tokenizer, dataclasses.replace(reading, prompt=p)) for p in ("plain", "template"))
    except Exception:  # a template is a program of others; the item is looked at again, and then said to be unusable
        return False
    return plain.ids != templated.ids
