"""GQA (Hudson 2019): testdev_balanced_questions.json, one right answer to each question; images NAME.jpg.

Of files that are not balanced, the balanced questions count, as in the published evaluation. Answer files:
[{questionId, prediction}] as the server takes them, or LLaVA's lines {question_id, text}.
"""

from __future__ import annotations

from pathlib import Path

from ...data.documents import published_file
from ...data.visual_tasks.gqa import gqa_questions
from . import Benchmark


class GQA(Benchmark):
    name = "gqa"
    shown = "testdev_balanced_questions.json and images/"
    id_keys = ("questionId", "question_id")
    text_keys = ("prediction", "text", "answer")

    def items(self, place: Path) -> list[dict]:
        path = published_file(place, "testdev_balanced_questions.json", "the questions of GQA")
        return gqa_questions(path)


BENCHMARKS = (GQA(),)
