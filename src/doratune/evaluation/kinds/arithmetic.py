"""Word problems whose answer is a number: AddSub, MultiArith, SingleEq, SVAMP, GSM8K (LLM-Adapters, behind the paper's tables).

The last number of the output counts, within 0.001 (`numbers.py` says what is a number). What follows a new heading ("### …") is no
answer to the item: a model that goes on to invent the next problem is stopped there. Protocol `paper` reads as LLM-Adapters'
evaluate.py does: 4 beams, at most 256 new tokens, all that stands before the next "### Response:".
"""

from __future__ import annotations

from collections.abc import Mapping

from ...data.published_prompts import evaluation_prompt
from ..numbers import last_number, number_of, published_number, same, shown
from . import PublishedEvaluation, TaskKind

SETTINGS = {"beams": 4, "max_new_tokens": 256}
HEADING = "\n###"


def before_heading(text: str) -> str:
    """An output up to the first heading that the model wrote itself."""
    return text.split(HEADING)[0]


def first_response(text: str) -> str:
    """The part of an output that the published script searches."""
    return text.split("### Response:")[0]


def is_right(answer: str | None, item: Mapping) -> bool:
    return same(None if answer is None else float(answer), number_of(item["answer"]))


class Arithmetic(TaskKind):
    name, rank = "arithmetic", 20
    tasks = ("AddSub", "MultiArith", "SingleEq", "SVAMP", "gsm8k")
    max_new_tokens = 256

    def recognizes(self, item: Mapping) -> bool:
        return "question" not in item and number_of(item.get("answer")) is not None

    def gold(self, item: Mapping) -> str:
        return shown(number_of(item["answer"]))

    def response(self, text: str) -> str:
        return before_heading(text)

    def answer(self, text: str, item: Mapping) -> str | None:
        return shown(last_number(text))

    def right(self, answer: str | None, item: Mapping) -> bool:
        return is_right(answer, item)

    def settled(self, text: str, item: Mapping) -> bool:
        return HEADING in text

    published = PublishedEvaluation(
        evaluation_prompt, first_response, lambda text, item: shown(published_number(text)), is_right, SETTINGS
    )


KINDS = (Arithmetic(),)
