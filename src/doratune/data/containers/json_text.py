"""JSON: .jsonl with one object a line, .json with one list of objects (or an object a line, as some programs write it).

Lines end in a line feed; any other separator may stand inside a string. A name that an object has twice is an error of that item:
Python would keep the last value silently. Cost: Python's parser; .jsonl is read line by line, a list is held whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UserError, listed
from . import LINE_BYTES, Container

_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class Repeated(dict):
    """An object that named some of its values twice."""

    names: list[str]


def repeated_names(value: Any) -> list[str]:
    """The names that an object, or one inside it, has twice."""
    if isinstance(value, Repeated):
        return value.names
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for one in inner for name in repeated_names(one)]


def _object(pairs: list[tuple[str, Any]]) -> dict:
    whole = dict(pairs)
    if len(whole) == len(pairs):
        return whole
    names = [name for name, _ in pairs]
    marked = Repeated(whole)
    marked.names = [name for name in whole if names.count(name) > 1]
    return marked


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(line, value) of .jsonl."""
    number, empty = 0, True
    while line := stream.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise UserError(f"{path}, line {number} is longer than {LINE_BYTES >> 20} MiB; write one item a line")
        text = decoded(path, line, number).removesuffix("\n").removesuffix("\r")
        if not text.strip():
            continue
        if empty and text.lstrip().startswith("[") and _is_list(text):
            raise UserError(f"{path} holds a JSON list, expected one JSON object a line; give it the ending .json")
        empty = False
        yield number, _value_or_error(path, text, number)
    if empty:
        raise UserError(f"{path} is empty; expected a JSON list or one JSON object a line")


def _is_list(first: str) -> bool:
    """Does a file's first line begin a list of items, in one line or in several?"""
    return first.strip() == "[" or first.lstrip(" [").startswith("{") or first.rstrip().endswith("]")


def read_json(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(line, value) of .json: one list, or an object a line."""
    text = decoded(path, stream.read())
    if not text.strip():
        raise UserError(f"{path} is empty; expected a JSON list or one JSON object a line")
    yield from _of_list(path, text) if text.lstrip().startswith("[") else _of_objects(path, text)


def decoded(path: Path, data: bytes, line: int | None = None) -> str:
    """UTF-8 text, without a byte-order mark in front."""
    try:
        return data.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        where = line or data.count(b"\n", 0, error.start) + 1
        kind = next((f"; it looks like {name}" for mark, name in _MARKS.items() if data.startswith(mark)), "")
        raise UserError(f"{path} is not UTF-8 text (line {where}){kind}; save it as UTF-8 JSON") from None


def _value(path: Path, text: str, line: int) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line}: malformed JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise UserError(f"{path}, line {line}: JSON that cannot be read ({str(error)[:100]})") from None


def _value_or_error(path: Path, text: str, line: int) -> Any:
    try:
        return _value(path, text, line)
    except UserError as error:
        return error


def _of_objects(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    first = True
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        value = _value_or_error(path, line.removesuffix("\r"), number)
        if first and isinstance(value, UserError) and (reason := _one_object(path, text)):
            raise UserError(reason)
        if first and isinstance(value, dict) and "\n" not in text.strip() and (reason := _wrapped(path, value)):
            raise UserError(reason)
        first = False
        yield number, value


def _one_object(path: Path, text: str) -> str | None:
    """What to say of a file that is one object over several lines."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return _wrapped(path, value) or f"{path} is one JSON object ({listed(value, 4)}); expected a JSON list, or one object a line"


def _wrapped(path: Path, value: dict) -> str | None:
    """What to say of an object whose items lie in a list under one of its names."""
    names = [n for n, inner in value.items() if isinstance(inner, list) and inner and all(isinstance(i, dict) for i in inner)]
    if len(names) != 1 or names[0] in ("messages", "conversations", "chosen", "rejected", "prompt", "completion", "tools"):
        return None
    return f"{path} is one JSON object with its items under {names[0]!r}; save that list alone"


def _of_list(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The items of one list, each with the line where it begins."""
    try:
        position, line, before = text.index("[") + 1, 1, 0
        position = _blank(text, position)
        if text[position : position + 1] == "]":
            return _check_end(path, text, position + 1)
        while True:
            line, before = line + text.count("\n", before, position), position
            value, position = _DECODER.raw_decode(text, position)
            yield line, value
            position = _blank(text, position)
            separator = text[position : position + 1]
            if separator == "]":
                return _check_end(path, text, position + 1)
            if separator != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
            position = _blank(text, position + 1)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: malformed JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: JSON that cannot be read ({str(error)[:100]})") from None


def _blank(text: str, position: int) -> int:
    """Where the white space behind a position ends."""
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _check_end(path: Path, text: str, position: int) -> None:
    if text[_blank(text, position) :]:
        raise json.JSONDecodeError("Extra data", text, _blank(text, position))


CONTAINERS = (Container((".json",), read_json, piecewise=False), Container((".jsonl", ".ndjson"), read_lines))
