"""GQA (Hudson 2019): an object of questions by id, one right answer to each; images NAME.jpg.

    train_balanced_questions.json     val_balanced_questions.json     testdev_balanced_questions.json     images/2370799.jpg

Of files that are not balanced, the balanced questions count, as in the published evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import UserError
from ..documents import document, published_file, value_of
from . import Sight, VisualItem, VisualTask, first_there

PARTS = {"train": "train", "val": "val", "test": "testdev"}


class GQAItems(VisualTask):
    name = "gqa"
    shown = "train_balanced_questions.json, testdev_balanced_questions.json and images/"
    scored = "exact"

    def items(self, place: Path, split: str) -> list[VisualItem]:
        path = published_file(place, f"{PARTS[split]}_balanced_questions.json", "the questions of GQA")
        items = []
        for one in gqa_questions(path):
            sight = Sight(first_there(path.parent, ("images", "."), [one["image"]]))
            where = f"{path}: question {one['id']}"
            items.append(VisualItem(self.name, one["id"], (sight,), one["question"], (one["answer"],), where))
        return items


def gqa_questions(path: Path) -> list[dict]:
    """{id, image, question, answer} of each balanced question, in order.

    Raises:
        UserError: a malformed file.
    """
    value = document(path)
    if not isinstance(value, Mapping) or not all(isinstance(one, Mapping) for one in value.values()):
        raise UserError(f"{path} is no object of questions by id; copy the published file again")
    items = []
    for name, one in value.items():
        if one.get("isBalanced") is False:
            continue
        where = f"{path}: question {name}"
        image, question = value_of(one, "imageId", str, where), value_of(one, "question", str, where)
        items.append({"id": name, "image": f"{image}.jpg", "question": question, "answer": value_of(one, "answer", str, where)})
    return items


TASKS = (GQAItems(),)
