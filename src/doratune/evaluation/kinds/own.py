"""Items of a user's own task (`own_items.py`): a free answer held against metrics, or one of the choices that the item offers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..own_items import OwnItem
from . import TaskKind


class FreeAnswers(TaskKind):
    """The first metric decides: an answer is right where it is 1."""

    name, rank = "own", 1
    protocols = ("generate",)
    max_new_tokens = 256

    def recognizes(self, item: Mapping) -> bool:
        return isinstance(item, OwnItem) and not item.offered

    def problem(self, item: Mapping) -> str | None:
        return None

    def prompt(self, item: Mapping) -> str:
        return item.kind.question(item, item.task.reading)

    def tokens(self, item: Mapping, tokenizer) -> list[int]:
        return item.tokens(tokenizer)

    def gold(self, item: Mapping) -> str:
        return item.gold

    def answer(self, text: str, item: Mapping) -> str | None:
        return text.strip() or None

    def right(self, answer: str | None, item: Mapping) -> bool:
        return next(iter(self.measures(answer or "", item).values())) == 1

    def measures(self, text: str, item: Mapping) -> dict[str, float]:
        return {name: metric(text.strip(), item.gold, item) for name, metric in item.metrics.items()}

    def figures(self, items: Sequence[Mapping], records: Sequence[Mapping]) -> dict:
        """Mean and standard error of each metric."""
        figures = {}
        for name in {name: None for record in records for name in record.get("measures", ())}:
            values = [record["measures"][name] for record in records if name in record["measures"]]
            mean = math.fsum(values) / len(values)
            variance = max(0.0, math.fsum(v * v for v in values) / len(values) - mean**2)
            figures[name] = {"mean": mean, "standard_error": math.sqrt(variance / len(values))}
        return {"metrics": figures}


class Choices(FreeAnswers):
    """`likelihood`: the most probable choice behind the prompt; `generate`: the first choice that the output names."""

    name = "choices"
    protocols = ("generate", "likelihood")
    max_new_tokens = 64

    def recognizes(self, item: Mapping) -> bool:
        return isinstance(item, OwnItem) and bool(item.offered)

    def choices(self, item: Mapping) -> tuple[str, ...]:
        return item.offered

    def answer(self, text: str, item: Mapping) -> str | None:
        """The choice that stands first in the text, the longest of those that begin there."""
        places = [(text.lower().find(choice.lower()), -len(choice), choice) for choice in item.offered]
        return min((place for place in places if place[0] >= 0), default=(0, 0, None))[2]

    def right(self, answer: str | None, item: Mapping) -> bool:
        return answer == item.gold

    def measures(self, text: str, item: Mapping) -> dict[str, float]:
        return {}

    def figures(self, items: Sequence[Mapping], records: Sequence[Mapping]) -> dict:
        return {}

    def group(self, item: Mapping):
        return self.name, item.offered

    def chance(self, item: Mapping) -> float:
        return 1 / len(item.offered)


KINDS = (FreeAnswers(), Choices())
