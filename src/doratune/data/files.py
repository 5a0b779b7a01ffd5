"""Files of examples: every item as an object, with its place for messages; what no item can be is named by its number.

The containers (.json, .jsonl, .csv, …) and compressions are in `containers/`. Cost: the container's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, kind_in_words, listed
from .containers import read_values
from .containers.json_text import repeated_names


class Item(dict):
    """One example as its file has it, with where it stands there, for messages.

    Attributes:
        where: "FILE: item 3". line: its first line in the file, or its row's number. source: the file or name it comes from.
        raw: the item before `columns` renamed its fields.
    """

    def __init__(self, values: dict, where: str, line: int | None = None, source: str = "", raw: dict | None = None):
        super().__init__(values)
        self.where, self.line, self.source, self.raw = where, line, source, raw if raw is not None else values

    def renamed(self, values: dict) -> Item:
        """The same item under other names of its fields."""
        return Item(values, self.where, self.line, self.source, self.raw)


def read_examples(path: Path, unusable: list[str] | None = None) -> list[Item]:
    """The examples of a file: see `each_example`.

    Raises:
        UserError: missing, empty or malformed file, with file and line.
    """
    items = list(each_example(path, unusable))
    if not items and not unusable:
        raise UserError(f"{path} holds no examples")
    return items


def each_example(path: Path, unusable: list[str] | None = None) -> Iterator[Item]:
    """The objects of a file, one after the other.

    Args:
        unusable: takes a line for each item that is malformed, no object, or names a value twice, and the item is skipped; None:
            the first stops.

    Raises:
        UserError: missing, empty or malformed file, with file and line.
    """
    for number, (line, value) in enumerate(read_values(path), 1):
        where = f"{path}: item {number}"
        problem = None
        if isinstance(value, UserError):
            problem = str(value)
        elif not isinstance(value, dict):
            problem = f"{where} is {kind_in_words(value)}, expected a JSON object"
        elif names := repeated_names(value):
            problem = f"{where} (line {line}) names {listed(map(repr, names), 3)} twice; leave one of the two"
        if problem is None:
            yield Item(value, where, line, str(path))
        elif unusable is None:
            raise UserError(problem)
        else:
            unusable.append(problem)


def placed(problem: str, item) -> str:
    """A problem with the line of its item in the file, where the item's number is not the line's."""
    line = getattr(item, "line", None)
    return problem if line is None or item.where.endswith(f" {line}") else f"{problem} (line {line})"
