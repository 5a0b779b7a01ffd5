"""The eight commonsense tasks (§5.1): which answers each allows, how an answer is found in a text.

The pattern is the paper's: the first allowed answer anywhere in the output; none means unparsable, which counts as wrong. A file
of mixed items is scored as well: each item's allowed answers follow from its gold answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...data.published_prompts import evaluation_prompt
from . import PublishedEvaluation, TaskKind

ANSWERS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
}
"""Task → the answers that its published pattern accepts."""

SETTINGS = {"beams": 4, "max_new_tokens": 32}
"""The published script's decoding."""

CONTINUATION = "the correct answer is {}"
"""What stands behind a prompt, in training and in protocol likelihood."""

_FAMILIES = tuple(dict.fromkeys(ANSWERS.values()))
_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")


def family(item: Mapping) -> tuple[str, ...] | None:
    """The answers that the pattern of this item's task accepts."""
    return next((answers for answers in _FAMILIES if item.get("answer") in answers), None)


def choices(item: Mapping) -> tuple[str, ...]:
    """The answers that this item offers: what its "Answer format: a/b/c" lists, else all of its task's."""
    if match := _FORMAT.search(item["instruction"]):
        listed = tuple(match[1].split("/"))
        if item["answer"] in listed and set(listed) <= set(family(item)):
            return listed
    return family(item)


def first_answer(text: str, item: Mapping) -> str | None:
    """The first allowed answer in a text, as the published scripts find it; None where there is none."""
    match = re.search("|".join(family(item)), text)
    return match[0] if match else None


def last_response(output: str) -> str:
    """The part of an output in which the published script looks for the answer."""
    return output.split("### Response:")[-1]


class Commonsense(TaskKind):
    name, rank = "commonsense", 10
    tasks = tuple(ANSWERS)
    protocols = ("generate", "likelihood", "paper")
    max_new_tokens = 32

    def recognizes(self, item: Mapping) -> bool:
        return family(item) is not None

    def answer(self, text: str, item: Mapping) -> str | None:
        return first_answer(text, item)

    def choices(self, item: Mapping) -> tuple[str, ...]:
        return choices(item)

    def continuation(self, choice: str) -> str:
        return CONTINUATION.format(choice)

    def settled(self, text: str, item: Mapping) -> bool:
        return first_answer(text, item) is not None

    def group(self, item: Mapping):
        return family(item)

    def chance(self, item: Mapping) -> float:
        return 1 / len(choices(item))

    published = PublishedEvaluation(
        evaluation_prompt, last_response, first_answer, lambda answer, item: answer == item["answer"], SETTINGS
    )


KINDS = (Commonsense(),)
