"""POPE (Li 2023): coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json, lines of question, image and
label.

Each file numbers its questions from 1; in a folder of several a question's name is CATEGORY/NUMBER, and `f1` is the mean of
the files'. With LLaVA's question file beside them (llava_pope_test.jsonl) the names are that file's, and the labels those of
the same place in the category, as LLaVA's script has it. Answer files: lines {question_id, text}, or {question_id, answer}.
"""

from __future__ import annotations

from pathlib import Path

from ...data.documents import entries, value_of
from ...errors import UserError
from ..kinds.yes_no import LABELS
from . import Benchmark

PREFIX, NAMED = "coco_pope_", "llava_pope_test.jsonl"


class POPE(Benchmark):
    name = "pope"
    shown = "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json and val2014/"
    image_places = ("images", "val2014")

    def items(self, place: Path) -> list[dict]:
        files = [place] if place.is_file() else sorted([*place.glob(f"{PREFIX}*.json"), *place.glob(f"coco/{PREFIX}*.json")])
        if not files:
            raise UserError(f"{place} holds no {PREFIX}*.json (the questions of POPE)")
        parts = {path.stem.removeprefix(PREFIX): self._part(path, len(files) > 1) for path in files}
        named = place / NAMED
        return _renamed(named, parts) if named.is_file() else [item for part in parts.values() for item in part]

    def _part(self, path: Path, several: bool) -> list[dict]:
        category, items = path.stem.removeprefix(PREFIX), []
        for n, one in enumerate(entries(path), 1):
            where = f"{path}: question {n}"
            number = value_of(one, "question_id", (int, str), where)
            if one.get("label") not in LABELS:
                raise UserError(f"{where} has the label {one.get('label')!r}; expected yes or no")
            item = {"id": f"{category}/{number}" if several else str(number), "image": value_of(one, "image", str, where)}
            items.append(item | {"question": value_of(one, "text", str, where), "label": one["label"], "category": category})
        return items


def _renamed(path: Path, parts: dict[str, list[dict]]) -> list[dict]:
    """The items under the names of LLaVA's question file."""
    items, places = [], dict.fromkeys(parts, 0)
    for n, one in enumerate(entries(path), 1):
        where, category = f"{path}: question {n}", one.get("category")
        if category not in parts or places[category] >= len(parts[category]):
            raise UserError(f"{where} is of the category {category!r}, which {PREFIX}*.json beside it do not have, or not so often")
        item = parts[category][places[category]]
        places[category] += 1
        if one.get("image") != item["image"]:
            raise UserError(f"{where} asks of {one.get('image')}, {PREFIX}{category}.json of {item['image']}; take one release")
        items.append(item | {"id": str(value_of(one, "question_id", (int, str), where))})
    return items


BENCHMARKS = (POPE(),)
