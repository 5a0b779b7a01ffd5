"""MMBench (Liu 2023): a table (mmbench_dev_*.tsv) with the image in Base64, options A to D, an answer, and each question
once for each rotation of its options.

The rows of one question have the same index modulo a million. Answer files: a table or JSON of {index, prediction}, or
LLaVA's lines {question_id, text}; a worksheet has to be saved as .csv. The test part has no published answers.
"""

from __future__ import annotations

from pathlib import Path

from ...data.documents import entries, published_file
from ...errors import UserError
from . import Benchmark

OPTIONS = "ABCDEFGH"
ROTATION = 1_000_000
"""Added to the index of a question, once for each rotation."""


class MMBench(Benchmark):
    name = "mmbench"
    shown = "mmbench_dev_*.tsv"
    id_keys = ("index", "question_id")
    text_keys = ("prediction", "text", "answer")

    def items(self, place: Path) -> list[dict]:
        path = published_file(place, "*.tsv", "the questions of MMBench")
        return [self._item(one, f"{path}: row {n}") for n, one in enumerate(entries(path), 1)]

    def _item(self, one: dict, where: str) -> dict:
        index, question, answer = ((one.get(key) or "").strip() for key in ("index", "question", "answer"))
        if not index.isdigit() or not question:
            raise UserError(f"{where} has no number under 'index', or no 'question'; copy the published file again")
        if not answer:
            raise UserError(f"{where} has no answer; a part without published answers cannot be scored here")
        choices = [one[letter].strip() for letter in OPTIONS if (one.get(letter) or "").strip() not in ("", "nan")]
        hint = (one.get("hint") or "").strip()
        item = {"id": index, "image": None, "question": question, "hint": "" if hint == "nan" else hint}
        if image := (one.get("image") or "").strip():
            item["image"] = f"data:image/jpeg;base64,{image}"
        return item | {"choices": choices, "answer": answer, "group": int(index) % ROTATION}


BENCHMARKS = (MMBench(),)
