"""Files of the benchmarks: JSON of any shape, JSON lines, tables; and answer files, held against the questions they answer.

Every question has one answer, and every answer a question: anything else is the answer file of other questions, or of a run
that did not finish, and its score would be a number about nothing. Cost: the file is held whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.containers import container_of, read_values
from ...errors import UserError, listed


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
        held = "nothing" if key not in entry else f"a {type(value).__name__}"
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


def answer_texts(path: Path, ids: Sequence[str], id_keys: Sequence[str], text_keys: Sequence[str]) -> list[str]:
    """The answer to each of these questions, in their order.

    Raises:
        UserError: malformed; questions without an answer, answers to other questions, or two to one.
    """
    texts: dict[str, str] = {}
    for number, entry in enumerate(entries(path), 1):
        name = next((key for key in id_keys if key in entry), None)
        text = next((key for key in text_keys if key in entry), None)
        if name is None or text is None or not isinstance(entry[text], str | int | float):
            lacking = " or ".join(map(repr, id_keys if name is None else text_keys))
            raise UserError(f"{path}: answer {number} has no {lacking}; its keys are {listed(map(repr, entry), 6)}")
        if str(entry[name]) in texts:
            raise UserError(f"{path}: answer {number} is the second to question {entry[name]}; leave one")
        texts[str(entry[name])] = str(entry[text])
    missing, strange = [one for one in ids if one not in texts], sorted(texts.keys() - set(ids))
    if missing or strange:
        parts = [f"{len(missing)} of {len(ids)} questions have no answer (the first: {missing[0]})"] if missing else []
        parts += [f"{len(strange)} answers are to other questions (the first: {strange[0]})"] if strange else []
        raise UserError(f"{path} does not belong to these questions: {', '.join(parts)}; give the answers to this very file")
    return [texts[one] for one in ids]


def people(answers: Any, where: str) -> list[str]:
    """The people's answers: a list of texts, or of objects with `answer`.

    Raises:
        UserError: neither, or none at all.
    """
    texts = [one.get("answer") if isinstance(one, Mapping) else one for one in answers] if isinstance(answers, list) else []
    if not texts or not all(isinstance(one, str) for one in texts):
        raise UserError(f"{where} has no list of people's answers; a part without published answers cannot be scored here")
    return texts
