"""A question about an image that several people answered: the score is how far they agree with the output (VQAv2, VizWiz,
TextVQA).

An item has `image`, `question` and `answers`; `normalization: textvqa` where TextVQA's rule counts. An empty output is
unparsable. `correct` in a record says that the answer counts in full.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..vqa import cleaned, most_frequent, soft_score
from . import TaskKind, no_text

SHORT = "Answer the question using a single word or phrase."
"""What LLaVA-1.5 puts below a question whose answer is short."""


def asked(item: Mapping, instruction: str) -> str:
    """The question with what is wanted below it; `prompt` of an item counts instead."""
    return item.get("prompt") or f"{item['question']}\n{instruction}"


class SoftAnswers(TaskKind):
    name, rank = "soft answers", 2
    protocols = ("generate",)
    max_new_tokens = 32

    def recognizes(self, item: Mapping) -> bool:
        answers = item.get("answers")
        return "image" in item and isinstance(answers, list) and bool(answers) and all(isinstance(one, str) for one in answers)

    def problem(self, item: Mapping) -> str | None:
        return no_text(item, "question")

    def prompt(self, item: Mapping) -> str:
        return asked(item, SHORT)

    def gold(self, item: Mapping) -> str:
        return most_frequent(item["answers"])

    def answer(self, text: str, item: Mapping) -> str | None:
        return cleaned(text) or None

    def score(self, answer: str | None, item: Mapping) -> float:
        return 0.0 if answer is None else soft_score(answer, item["answers"], item.get("normalization") == "textvqa")

    def right(self, answer: str | None, item: Mapping) -> bool:
        return self.score(answer, item) > 1 - 1e-9


KINDS = (SoftAnswers(),)
