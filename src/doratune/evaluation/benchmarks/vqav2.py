"""VQAv2 (Goyal 2017): a question file and its annotation file, with ten answers to each question; images of COCO.

Published names: v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, images
val2014/COCO_val2014_….jpg. The test parts have no published answers: their results go to the benchmark's server. Answer
files: [{question_id, answer}] as the server takes them, or LLaVA's lines {question_id, text}.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError
from . import Benchmark
from .documents import document, entries, people, published_file, value_of


class VQAv2(Benchmark):
    name = "vqav2"
    shown = "*questions.json, *annotations.json and val2014/"
    image_places = ("images", "val2014", "train2014")

    def items(self, place: Path) -> list[dict]:
        questions = published_file(place, "*questions.json", "the questions of VQAv2")
        answers = published_file(questions.parent, "*annotations.json", "the answers; the test parts have none")
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
    known = ("val2014", "train2014")
    part = named if named in known else next((one for one in known if one in questions.name), None)
    if part is None:
        raise UserError(f"{questions} does not say whether it is of {' or '.join(known)}; keep its published name")
    return part


BENCHMARKS = (VQAv2(),)
