"""ScienceQA (Lu 2022): problems.json and pid_splits.json; the test part, with and without an image (test/ID/image.png).

The published LLaVA figure is that of the items with an image (`accuracy_with_image`). Answer files: LLaVA's lines
{question_id, text}, or [{question_id, answer}].
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path

from ...data.documents import document, published_file, value_of
from ...errors import UserError
from . import Benchmark

PART = "test"


class ScienceQA(Benchmark):
    name = "science_qa"
    shown = "problems.json, pid_splits.json and test/ID/image.png"
    image_places = ("images", "images/test", PART)

    def items(self, place: Path) -> list[dict]:
        path = published_file(place, "problems.json", "the problems of ScienceQA")
        splits = published_file(path.parent, "pid_splits.json", "which problem is of which part")
        problems, parts = document(path), document(splits)
        names = parts.get(PART) if isinstance(parts, Mapping) else None
        if not isinstance(names, list) or not isinstance(problems, Mapping):
            raise UserError(f"{splits} lists no part {PART!r}, or {path} is no object of problems; copy the published files again")
        return [self._item(path, problems, str(name)) for name in names]

    def _item(self, path: Path, problems: Mapping, name: str) -> dict:
        one, where = problems.get(name), f"{path}: problem {name}"
        if not isinstance(one, Mapping):
            raise UserError(f"{where} is missing; copy problems.json and pid_splits.json of one release")
        choices, answer = value_of(one, "choices", list, where), value_of(one, "answer", int, where)
        if not 0 <= answer < len(choices) <= len(string.ascii_uppercase):
            raise UserError(f"{where} has the answer {answer}, but {len(choices)} choices; copy the published file again")
        return {
            "id": name,
            "image": f"{name}/{one['image']}" if one.get("image") else None,
            "question": value_of(one, "question", str, where),
            "hint": one.get("hint") or "",
            "choices": choices,
            "answer": string.ascii_uppercase[answer],
            "letters_only": True,
        }


BENCHMARKS = (ScienceQA(),)
