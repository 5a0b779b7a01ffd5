"""Published files of JSON: whole documents of any shape, JSON lines, tables; their lists and values, named where one is not as it
should be.

Cost: a file is held whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, kind_in_words, listed
from .containers import container_of, read_values


def document(path: Path) -> Any:
    """The value of a JSON file; of JSON lines and tables, the list of their objects.

    Raises:
        UserError: missing or malformed.
    """
    if path.suffix.lower() == ".json":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            return json.loads(path.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError):
            pass  # JSON lines under this name, or the container says where it is malformed
    elif container_of(path) is None:
        raise UserError(
            f"{path} ends in {path.suffix or 'nothing'}, which is not read here; save it as .jsonl, .json, .csv or .tsv"
        )
    values = []
    for _, value in read_values(path):
        if isinstance(value, UserError):
            raise value
        values.append(value)
    return values


def entries(path: Path, key: str | None = None) -> list[dict]:
    """The objects of a list in a file: the file's own, or that under a key.

    Raises:
        UserError: no such list.
    """
    value = document(path)
    if key is not None:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise UserError(f"{path} holds no list of objects{f' under {key!r}' if key else ''}; copy the published file again")
    return value


def value_of(entry: Mapping, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A value of an object.

    Raises:
        UserError: it is missing, or of another type.
    """
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        held = "nothing" if key not in entry else kind_in_words(value)
        raise UserError(f"{where} has {held} under {key!r}; copy the published file again")
    return value


def published_file(place: Path, pattern: str, what: str) -> Path:
    """The one file of a folder that a pattern fits; a file that was named itself counts.

    Raises:
        UserError: none, or several.
    """
    if place.is_file():
        return place
    files = sorted(path for path in place.glob(pattern) if path.is_file())
    if len(files) == 1:
        return files[0]
    if not files:
        raise UserError(f"{place} holds no {pattern} ({what})")
    raise UserError(f"{place} holds several {pattern}: {listed([f.name for f in files], 4)}; give one instead of the folder")


def people(answers: Any, where: str) -> list[str]:
    """The people's answers: a list of texts, or of objects with `answer`.

    Raises:
        UserError: neither, or none at all.
    """
    texts = [one.get("answer") if isinstance(one, Mapping) else one for one in answers] if isinstance(answers, list) else []
    if not texts or not all(isinstance(one, str) for one in texts):
        raise UserError(f"{where} has no list of people's answers; a part without published answers cannot be scored here")
    return texts
