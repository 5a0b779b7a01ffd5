"""TextVQA (Singh 2019): TextVQA_0.5.1_val.json with ten answers to each question; images NAME.jpg.

Answer files: [{question_id, answer}], or lines {question_id, text} by question. LLaVA's own scripts put detected words of
the image below the question (its Table's figures are with them); these items ask the question alone.
"""

from __future__ import annotations

from pathlib import Path

from ...data.documents import entries, people, published_file, value_of
from . import Benchmark


class TextVQA(Benchmark):
    name = "textvqa"
    shown = "TextVQA_0.5.1_val.json and train_images/"
    image_places = ("images", "train_images", "train_val_images/train_images")

    def items(self, place: Path) -> list[dict]:
        path = published_file(place, "TextVQA_*_val.json", "the questions of TextVQA")
        items = []
        for n, one in enumerate(entries(path, "data"), 1):
            where = f"{path}: question {n}"
            items.append(
                {
                    "id": str(value_of(one, "question_id", (int, str), where)),
                    "image": f"{value_of(one, 'image_id', str, where)}.jpg",
                    "question": value_of(one, "question", str, where),
                    "answers": people(one.get("answers"), where),
                    "normalization": "textvqa",
                }
            )
        return items


BENCHMARKS = (TextVQA(),)
