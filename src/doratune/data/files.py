"""Reading JSON and JSONL files of examples, with the line or item named when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError


def read_examples(path: Path) -> list[dict]:
    """A list of JSON objects from a .json (one list) or .jsonl (one object a line) file.

    Raises:
        UserError: missing, empty or malformed file, with file and line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such data file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8 JSON") from None
    if not text.strip():
        raise UserError(f"{path} is empty; expected a JSON list or one JSON object a line")
    examples = _lines(path, text) if path.suffix == ".jsonl" or not text.lstrip().startswith("[") else _whole(path, text)
    if not examples:
        raise UserError(f"{path} holds no examples")
    for number, example in enumerate(examples, 1):
        if not isinstance(example, dict):
            raise UserError(f"{path}: item {number} is a {type(example).__name__}, expected a JSON object")
    return examples


def _whole(path: Path, text: str) -> list:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: malformed JSON ({error.msg})") from None


def _lines(path: Path, text: str) -> list:
    examples = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            examples.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: malformed JSON ({error.msg})") from None
    return examples
