"""Formats of training items, one file a format: by which keys it is recognized, what an item needs, what of it is learned.

A format is an instance without state; files in this folder that hold `FORMATS` are found by themselves: a new format is one new
file. The names are the field's: Alpaca's, ShareGPT's, OpenAI's, TRL's.

    instruction.py   Alpaca: instruction, input, output
    messages.py      chat: messages with role and content, tools, tool calls and results
    visual.py        messages or conversations with images (LLaVA's JSON)
    sharegpt.py      conversations with from and value, tools
    completion.py    prompt and completion, as text or as messages
    questions.py     question and worked answer, in Orca-Math's prompt
    text.py          plain text, for continued pretraining
    preference.py    pairs: chosen and rejected answers, for DPO
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from ...errors import UserError, listed, near_misses

if TYPE_CHECKING:
    from ..encode import Encoded
    from ..image_sources import ImageSource
    from ..settings import DataSettings


class DataFormat:
    """Subclasses declare and override."""

    name: str
    """As `data_format` names it."""
    aliases: tuple[str, ...] = ()
    shown: str
    """Its keys, for messages: "instruction, input, output"."""
    keys: tuple[tuple[str, ...], ...]
    """An item with all keys of one of these groups is of this format."""
    optional: tuple[str, ...] = ()
    """Further fields that it reads."""
    inner: tuple[str, ...] = ()
    """Fields of the messages in its lists."""
    usual: Mapping[str, tuple[str, ...]] = {}
    """Field → what other files call it, for the message about an unknown item."""
    rank = 50
    """Formats of lower rank are asked first: an item may have the keys of several."""
    takes: tuple[str, ...] = ()
    """Names of other formats whose items it takes as well: a data set may mix conversations with images and without."""
    learns = True
    """Is it what `doratune train` learns from?"""
    sees = False
    """Does it read the images that an item names?"""

    def fields(self) -> tuple[str, ...]:
        """Every name that `columns` may map."""
        return tuple(dict.fromkeys([*(name for group in self.keys for name in group), *self.optional, *self.inner]))

    def recognizes(self, item: Mapping) -> bool:
        """Has the item all keys of one of the format's groups?"""
        return any(all(name in item for name in group) for group in self.keys)

    def check(self, item: Mapping, where: str, settings: DataSettings) -> None:
        """Raise UserError for an item without what the format needs; `where` begins the message."""
        raise NotImplementedError

    def encode(self, item: Mapping, tokenizer, settings: DataSettings) -> Encoded:
        """The tokens of a checked item, and which are learned.

        Raises:
            UserError: it cannot be rendered, or its turns, tools or words are not what they should be.
        """
        raise NotImplementedError

    def parts(self, item: Mapping, tokenizer, settings: DataSettings) -> list[tuple[str, Encoded]]:
        """(name, tokens) of what a model sees of the item: one part, but for pairs."""
        return [("", self.encode(item, tokenizer, settings))]

    def odd(self, item: Mapping, settings: DataSettings) -> list[str]:
        """What is odd about an item that can be used: of any format, and its own `notes`."""
        return [*self.unseen(item), *self.notes(item, settings)]

    def unseen(self, item: Mapping) -> list[str]:
        """A line where the item names an image, and a model that learns it is not shown any."""
        named = not self.sees and any(item.get(key) for key in ("image", "images"))
        return [f"has an image, which {self.name} data does not show; make it messages or conversations"] if named else []

    def notes(self, item: Mapping, settings: DataSettings) -> list[str]:
        """What is odd about an item that can be used."""
        return []

    def question(self, item: Mapping, settings: DataSettings) -> str:
        """What the item asks, without its answer, to compare items by."""
        raise NotImplementedError

    def sources(self, item: Mapping, settings: DataSettings) -> list[ImageSource]:
        """The images in front of a checked item's last answer, in order.

        Raises:
            UserError: a value that names none.
        """
        return []

    def asking(self, text: str) -> dict:
        """An item that asks this; what stands for the answer is of no meaning.

        Raises:
            UserError: items of this format ask nothing.
        """
        raise UserError(f"{self.name} data asks nothing")

    def gold(self, item: Mapping, settings: DataSettings) -> str:
        """The last answer of a checked item, as text.

        Raises:
            UserError: it has none.
        """
        raise UserError(f"{self.name} data holds no answer to compare with")


@cache
def formats() -> tuple[DataFormat, ...]:
    """Every format, the one that is asked first in front."""
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    known = [one for module in modules for one in getattr(module, "FORMATS", ())]
    return tuple(sorted(known, key=lambda one: one.rank))


def names_of_formats() -> tuple[str, ...]:
    return tuple(name for one in formats() for name in (one.name, *one.aliases))


def format_named(name: str) -> DataFormat:
    """Raises UserError for an unknown name, with near misses."""
    for one in formats():
        if name in (one.name, *one.aliases):
            return one
    raise UserError(
        f"data_format is {name!r}; expected one of {', '.join(names_of_formats())}{near_misses(name, names_of_formats())}"
    )


def format_of(item: Mapping) -> DataFormat | None:
    """The format whose keys the item has; None where no format's keys are all there."""
    return next((one for one in formats() if one.recognizes(item)), None)


def first_format(items: Iterable[Mapping]) -> DataFormat | None:
    """The format of the first item that has one, or the one among the items' formats that takes items of that too."""
    kinds = [kind for item in items if (kind := format_of(item))]
    return next((kind for kind in kinds if kinds[0].name in kind.takes), kinds[0] if kinds else None)


def nearest(item: Mapping) -> DataFormat | None:
    """The format of which an item has most keys; None where it has none of any."""
    counts = {one: max(sum(name in item for name in group) for group in one.keys) for one in formats()}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else None


def suggestion(item: Mapping) -> tuple[DataFormat, dict[str, str]] | None:
    """The format that an item would be of if its keys had their usual names, with those columns; the fewest of them."""
    options = []
    for one in formats():
        for group in one.keys:
            names = {field: next((k for k in (field, *one.usual.get(field, ())) if k in item), None) for field in group}
            if all(names.values()):
                options.append((one, {field: name for field, name in names.items() if field != name}))
    return min(options, key=lambda option: len(option[1]), default=None)


def unknown_item(item: Mapping, where: str) -> str:
    """What to say of an item that is of no format: its keys, and how they could be mapped."""
    keys = listed((repr(str(key)) for key in item), 8) or "none"
    if (usual := suggestion(item)) is not None:
        mapped = ", ".join(f"{field}: {name}" for field, name in usual[1].items())
        return f"{where} has the keys {keys}, which no format has; for {usual[0].name} data set columns: {{{mapped}}}"
    known = "; ".join(f"{one.name} ({one.shown})" for one in formats())
    return f"{where} has the keys {keys}, which no format has; there are {known}: rename keys by columns, or set data_format"
