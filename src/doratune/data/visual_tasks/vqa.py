"""VQAv2 (Goyal 2017): a question file and its annotation file, with ten answers to each question; images of COCO.

    v2_OpenEnded_mscoco_train2014_questions.json     v2_mscoco_train2014_annotations.json     train2014/COCO_train2014_….jpg
    v2_OpenEnded_mscoco_val2014_questions.json       v2_mscoco_val2014_annotations.json       val2014/COCO_val2014_….jpg

The test parts have no published answers.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError
from ..documents import document, entries, people, published_file, value_of
from . import Sight, VisualItem, VisualTask, first_there

KNOWN = ("val2014", "train2014")


class VQA(VisualTask):
    name = "vqa"
    shown = "*train2014_questions.json, *train2014_annotations.json, train2014/ and the same of val2014"
    scored = "soft"

    def items(self, place: Path, split: str) -> list[VisualItem]:
        if split not in ("train", "val"):
            raise UserError(f"vqa has no published answers for {split}; give train or val")
        questions = published_file(place, f"*{split}2014_questions.json", "the questions of VQAv2")
        answers = published_file(questions.parent, f"*{split}2014_annotations.json", "their answers")
        folder = questions.parent
        items = []
        for one in vqa_questions(questions, answers):
            part = one["image"].split("_")[1]
            sight = Sight(first_there(folder, (part, f"images/{part}", "images", "."), [one["image"]]))
            where = f"{questions}: question {one['id']}"
            items.append(VisualItem(self.name, one["id"], (sight,), one["question"], tuple(one["answers"]), where))
        return items


def vqa_questions(questions: Path, answers: Path) -> list[dict]:
    """{id, image, question, answers} of each question, in order.

    Raises:
        UserError: malformed files, or of different parts.
    """
    asked = entries(questions, "questions")
    part = _part(questions)
    annotated = {
        str(value_of(one, "question_id", (int, str), f"{answers}: annotation {n}")): one
        for n, one in enumerate(entries(answers, "annotations"), 1)
    }
    items = []
    for n, one in enumerate(asked, 1):
        where = f"{questions}: question {n}"
        name = str(value_of(one, "question_id", (int, str), where))
        if name not in annotated:
            raise UserError(f"{where} ({name}) has no annotation in {answers}; the two files are of different parts")
        image = value_of(one, "image_id", int, where)
        items.append(
            {
                "id": name,
                "image": f"COCO_{part}_{image:012d}.jpg",
                "question": value_of(one, "question", str, where),
                "answers": people(annotated[name].get("answers"), f"{answers}: the annotation of question {name}"),
            }
        )
    return items


def _part(questions: Path) -> str:
    """val2014 or train2014: what the file says, else its name."""
    named = document(questions).get("data_subtype")
    part = named if named in KNOWN else next((one for one in KNOWN if one in questions.name), None)
    if part is None:
        raise UserError(f"{questions} does not say whether it is of {' or '.join(KNOWN)}; keep its published name")
    return part


TASKS = (VQA(),)
