"""Question and worked answer, compared by their last numbers: Orca-Math (§6.1), and GSM8K's own files ("… #### 72").

`generate` compares numbers (`numbers.py`), within 0.001. Protocol `paper` is the exact match of the published evaluation
(Answer.AI's, behind Fig. 6): greedy, at most 1,024 new tokens, the last number or ratio of both texts, equal as text with its
currency sign. There "$5" is not "5", and of "1,000" only "000" is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...data.formats.questions import prompt_of
from ..numbers import last_number, same, shown
from . import PublishedEvaluation, TaskKind, no_text
from .arithmetic import HEADING, before_heading

SETTINGS = {"beams": 1, "max_new_tokens": 1024}
_PUBLISHED = re.compile(r"[$€£]?\d+(?:\.\d+)?(?::\d+(?:\.\d+)?)?")


def last_number_or_ratio(text: str) -> str | None:
    """What the published exact match compares; None where there is none."""
    matches = _PUBLISHED.findall(text)
    return matches[-1] if matches else None


class OrcaMath(TaskKind):
    name, rank = "orca_math", 30
    tasks = ("orca_math",)
    max_new_tokens = 1024

    def recognizes(self, item: Mapping) -> bool:
        return "question" in item and isinstance(item.get("answer"), str) and last_number(item["answer"]) is not None

    def problem(self, item: Mapping) -> str | None:
        return no_text(item, "question")

    def prompt(self, item: Mapping) -> str:
        return prompt_of(item)

    def gold(self, item: Mapping) -> str:
        return shown(last_number(item["answer"]))

    def response(self, text: str) -> str:
        return before_heading(text)

    def answer(self, text: str, item: Mapping) -> str | None:
        return shown(last_number(text))

    def right(self, answer: str | None, item: Mapping) -> bool:
        return same(None if answer is None else float(answer), last_number(item["answer"]))

    def settled(self, text: str, item: Mapping) -> bool:
        return HEADING in text

    published = PublishedEvaluation(
        prompt_of,
        lambda text: text,
        lambda text, item: last_number_or_ratio(text),
        lambda answer, item: answer is not None and answer == last_number_or_ratio(item["answer"]),
        SETTINGS,
    )


KINDS = (OrcaMath(),)
