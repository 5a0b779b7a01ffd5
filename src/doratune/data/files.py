"""Reading JSON and JSONL files of examples, with the line or item named when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from ..support.text import lines, read_text


class Item(dict):
    """One example as its file has it, with where it stands there, for messages."""

    def __init__(self, values: dict, where: str):
        super().__init__(values)
        self.where = where


def read_examples(path: Path, unusable: list[str] | None = None) -> list[Item]:
    """A list of JSON objects from a .json (one list) or .jsonl (one object a line, lines end in a line feed) file.

    Args:
        unusable: takes a line for each item that is no object, and the item is skipped; None: the first stops.

    Raises:
        UserError: missing, empty or malformed file, with file and line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such data file")
    try:
        text = read_text(path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8 JSON") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that you may read") from None
    if not text.strip():
        raise UserError(f"{path} is empty; expected a JSON list or one JSON object a line")
    examples = _lines(path, text) if path.suffix == ".jsonl" or not text.lstrip().startswith("[") else _whole(path, text)
    if not examples:
        raise UserError(f"{path} holds no examples")
    items = []
    for number, example in enumerate(examples, 1):
        if isinstance(example, dict):
            items.append(Item(example, f"{path}: item {number}"))
            continue
        problem = f"{path}: item {number} is a {type(example).__name__}, expected a JSON object"
        if unusable is None:
            raise UserError(problem)
        unusable.append(problem)
    return items


def _whole(path: Path, text: str) -> list:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: malformed JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise UserError(f"{path}: JSON that cannot be read ({str(error)[:100]})") from None


def _lines(path: Path, text: str) -> list:
    examples = []
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        try:
            examples.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: malformed JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: JSON that cannot be read ({str(error)[:100]})") from None
    return examples
