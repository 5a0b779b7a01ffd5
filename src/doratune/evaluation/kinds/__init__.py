"""Kinds of task items, one file a kind: how an item asks, where an output's answer is, when it is right.

    commonsense.py   one of a few allowed answers (§5.1)
    arithmetic.py    a number, the last one of the output (LLM-Adapters' five test sets)
    orca_math.py     question and worked answer, compared by their last numbers (§6.1)
    soft_answers.py  an image's question that several people answered (VQAv2, VizWiz, TextVQA)
    phrase.py        an image's question with one right phrase (GQA)
    options.py       a question with lettered options (ScienceQA, MMBench)
    yes_no.py        is it in the image? (POPE)
    own.py           a user's own task: free answers by metrics, one of an item's choices

A kind is an instance without state. Files in this folder that hold `KINDS` are found by themselves: a new kind is one new
file. An item says by its keys and its answer which kind it is, so a file may hold several.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...data.instruction import prompt_of
from ..images import prompt_tokens


@dataclass(frozen=True)
class PublishedEvaluation:
    """Protocol `paper` of one kind: the published script's prompt, decoding and reading of an output."""

    prompt: Callable[[Mapping], str]
    response: Callable[[str], str]
    """The part of an output that is searched."""
    answer: Callable[[str, Mapping], str | None]
    right: Callable[[str | None, Mapping], bool]
    settings: dict[str, int]
    """beams, max_new_tokens."""


class TaskKind:
    """Subclasses declare and override."""

    name: str
    rank = 50
    """Kinds of lower rank are asked first."""
    tasks: tuple[str, ...] = ()
    """The published tasks of the kind, by name."""
    protocols: tuple[str, ...] = ("generate", "paper")
    max_new_tokens: int
    """Longest output of protocol generate, unless set."""
    published: PublishedEvaluation

    def recognizes(self, item: Mapping) -> bool:
        """Is this an item of the kind, with an answer that an output can be held against?"""
        raise NotImplementedError

    def problem(self, item: Mapping) -> str | None:
        """What an item of the kind lacks: " has no text under …"."""
        return no_text(item, "instruction")

    def prompt(self, item: Mapping) -> str:
        """The text in front of the answer."""
        return prompt_of(item)

    def tokens(self, item: Mapping, tokenizer) -> list[int]:
        """The tokens in front of the answer."""
        return prompt_tokens(tokenizer, self.prompt(item), item)

    def gold(self, item: Mapping) -> Any:
        """The right answer, as records show it."""
        return item["answer"]

    def response(self, text: str) -> str:
        """The part of an output that is the answer to this item."""
        return text

    def answer(self, text: str, item: Mapping) -> str | None:
        """The answer that a text gives; None where it gives none."""
        raise NotImplementedError

    def right(self, answer: str | None, item: Mapping) -> bool:
        """Does this answer count?"""
        return answer == self.gold(item)

    def score(self, answer: str | None, item: Mapping) -> float:
        """How far this answer counts, 0 to 1; the mean is the accuracy."""
        return float(self.right(answer, item))

    def measures(self, text: str, item: Mapping) -> dict[str, float]:
        """Further metrics of an output, 0 to 1, by name."""
        return {}

    def choices(self, item: Mapping) -> tuple[str, ...]:
        """The answers that protocol likelihood compares."""
        raise NotImplementedError

    def continuation(self, choice: str) -> str:
        """The text of a choice behind the prompt."""
        return choice

    def figures(self, items: Sequence[Mapping], records: Sequence[Mapping]) -> dict:
        """Figures of the kind's own, from its items and their records; they stand beside, or instead of, those of every kind."""
        return {}

    def settled(self, text: str, item: Mapping) -> bool:
        """Can nothing that a text is continued with change the answer?"""
        return False

    def group(self, item: Mapping) -> Any:
        """Items of one group share their answers; the most frequent one is the group's majority level."""
        return self.name

    def chance(self, item: Mapping) -> float:
        """Accuracy of guessing."""
        return 0.0


def no_text(item: Mapping, key: str) -> str | None:
    """The problem of an item without text under a key; None where it has some."""
    return None if isinstance(item.get(key), str) and item[key].strip() else f" has no text under {key!r}"


@cache
def kinds() -> tuple[TaskKind, ...]:
    """Every kind, the one that is asked first in front."""
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    return tuple(sorted((one for module in modules for one in getattr(module, "KINDS", ())), key=lambda one: one.rank))


def kind_of(item: Mapping) -> TaskKind | None:
    """The kind of an item; None where no kind can score it."""
    return next((one for one in kinds() if one.recognizes(item)), None)
