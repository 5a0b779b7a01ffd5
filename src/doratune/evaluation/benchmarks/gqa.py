"""GQA (Hudson 2019): testdev_balanced_questions.json, one right answer to each question; images NAME.jpg.

Of files that are not balanced, the balanced questions count, as in the published evaluation. Answer files:
[{questionId, prediction}] as the server takes them, or LLaVA's lines {question_id, text}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import UserError
from . import Benchmark
from .documents import document, published_file, value_of


class GQA(Benchmark):
    name = "gqa"
    shown = "testdev_balanced_questions.json and images/"
    id_keys = ("questionId", "question_id")
    text_keys = ("prediction", "text", "answer")

    def items(self, place: Path) -> list[dict]:
        path = published_file(place, "testdev_balanced_questions.json", "the questions of GQA")
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


BENCHMARKS = (GQA(),)
