"""A question with lettered options (ScienceQA, MMBench): the option's letter is read from the output, in this order.

    B    B.    (B)    B: …     the letter by itself, or in front
    the answer is B            behind these words
    the text of one option     where the output holds one option's alone; not with `letters_only` (ScienceQA)

Anything else is unparsable: wrong, where some published scripts draw an option. MMBench's circular evaluation asks each
question once for each rotation of its options: `circular_accuracy` is the share of questions (`group`) that are right every
time. MMBench's own scores read unclear outputs by a language model; these do not.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from . import TaskKind, no_text
from .soft_answers import asked

LETTER = "Answer with the option's letter from the given choices directly."
"""What LLaVA-1.5 puts below such a question."""


def lettered(choices: Sequence[str]) -> str:
    """The options, one a line: "A. red"."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices))


def option_of(text: str, choices: Sequence[str], letters_only: bool = False) -> str | None:
    """The letter of the option that a text names; None where it names none, or several."""
    letters = string.ascii_uppercase[: len(choices)]
    text = text.strip()
    for pattern in (rf"\(?([{letters}])\)?[.:]?", rf"\(?([{letters}])(?:[.:)]|\))\s.*", rf".*\b[Aa]nswer is \(?([{letters}])\b.*"):
        if match := re.fullmatch(pattern, text, re.DOTALL):
            return match[1]
    if letters_only:
        return None
    named = [letter for letter, choice in zip(letters, choices) if choice.strip() and choice.strip().lower() in text.lower()]
    return named[0] if len(named) == 1 else None


class Options(TaskKind):
    name, rank = "options", 3
    protocols = ("generate",)
    max_new_tokens = 32

    def recognizes(self, item: Mapping) -> bool:
        choices, answer = item.get("choices"), item.get("answer")
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(string.ascii_uppercase) or not isinstance(answer, str):
            return False
        return "image" in item and len(answer) == 1 and answer in string.ascii_uppercase[: len(choices)]

    def problem(self, item: Mapping) -> str | None:
        if not all(isinstance(choice, str) for choice in item["choices"]):
            return " has no list of texts under 'choices'"
        return no_text(item, "question")

    def prompt(self, item: Mapping) -> str:
        hint = f"{item['hint']}\n" if item.get("hint") else ""
        return item.get("prompt") or f"{hint}{asked(item, lettered(item['choices']))}\n{LETTER}"

    def answer(self, text: str, item: Mapping) -> str | None:
        return option_of(text, item["choices"], bool(item.get("letters_only")))

    def group(self, item: Mapping):
        return self.name, len(item["choices"])

    def chance(self, item: Mapping) -> float:
        return 1 / len(item["choices"])

    def figures(self, items: Sequence[Mapping], records: Sequence[Mapping]) -> dict:
        figures = {}
        groups: dict[object, list[bool]] = {}
        for item, record in zip(items, records, strict=True):
            groups.setdefault(item.get("group", id(item)), []).append(record["correct"])
        if len(groups) < len(items):
            figures["circular_accuracy"] = sum(map(all, groups.values())) / len(groups)
        with_image = [r["correct"] for item, r in zip(items, records, strict=True) if item.get("image")]
        if 0 < len(with_image) < len(items):
            figures["accuracy_with_image"] = sum(with_image) / len(with_image)
        return figures


KINDS = (Options(),)
