"""VizWiz-VQA (Gurari 2018): val.json with ten answers to each question; one question an image, which is its name in answer
files.

Answer files: [{image, answer}] as the server takes them, or lines {question_id, text} with the image's name as question_id.
The test part has no published answers.
"""

from __future__ import annotations

from pathlib import Path

from ...data.documents import entries, people, published_file, value_of
from ..kinds.soft_answers import SHORT
from . import Benchmark

INSTRUCTION = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
"""What LLaVA-1.5 puts below a question of VizWiz."""


class VizWiz(Benchmark):
    name = "vizwiz"
    shown = "val.json and val/"
    image_places = ("images", "val", "train")
    id_keys = ("image", "question_id")

    def items(self, place: Path) -> list[dict]:
        path = published_file(place, "val.json", "the questions of VizWiz")
        items = []
        for n, one in enumerate(entries(path), 1):
            where = f"{path}: question {n}"
            image, question = value_of(one, "image", str, where), value_of(one, "question", str, where)
            answers = people(one.get("answers"), where)
            items.append(
                {"id": image, "image": image, "question": question, "prompt": f"{question}\n{INSTRUCTION}", "answers": answers}
            )
        return items


BENCHMARKS = (VizWiz(),)
