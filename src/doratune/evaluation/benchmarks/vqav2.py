"""VQAv2 (Goyal 2017): a question file and its annotation file, with ten answers to each question; images of COCO.

Published names: v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, images
val2014/COCO_val2014_….jpg. The test parts have no published answers: their results go to the benchmark's server. Answer
files: [{question_id, answer}] as the server takes them, or LLaVA's lines {question_id, text}.
"""

from __future__ import annotations

from pathlib import Path

from ...data.documents import published_file
from ...data.visual_tasks.vqa import vqa_questions
from . import Benchmark


class VQAv2(Benchmark):
    name = "vqav2"
    shown = "*questions.json, *annotations.json and val2014/"
    image_places = ("images", "val2014", "train2014")

    def items(self, place: Path) -> list[dict]:
        questions = published_file(place, "*questions.json", "the questions of VQAv2")
        answers = published_file(questions.parent, "*annotations.json", "the answers; the test parts have none")
        return vqa_questions(questions, answers)


BENCHMARKS = (VQAv2(),)
