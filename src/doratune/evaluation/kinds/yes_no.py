"""Is it in the image? POPE: accuracy, precision, recall and F1 of "yes", and the share of "yes", each over three sets of
questions.

The reading is the published one: the first sentence without commas is "no" if one of its words is no, No or not, and "yes"
otherwise. It finds an answer in any output; `unparsable` counts those without any such word or yes. An item has `image`,
`question` and `label`; items with a `category` are scored by category too, and `f1` is then the mean over categories, as it
is published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from . import TaskKind, no_text
from .soft_answers import SHORT, asked

LABELS = ("yes", "no")
_NO = {"No", "no", "not"}


def verdict(text: str) -> str:
    """What the published script reads in an output."""
    return "no" if _NO & set(text.split(".")[0].replace(",", "").split(" ")) else "yes"


def says_neither(text: str) -> bool:
    """Does an output hold none of the words that answer?"""
    words = {word.strip(".,!?:;\"'()").lower() for word in text.split()}
    return not words & {"yes", "no", "not"}


def rates(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and its share, of (answer, label) pairs; 0 where a denominator is."""
    pairs = list(pairs)
    both = sum(answer == label == "yes" for answer, label in pairs)
    said, there = sum(answer == "yes" for answer, _ in pairs), sum(label == "yes" for _, label in pairs)
    precision, recall = both / said if said else 0.0, both / there if there else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_share": said / len(pairs)}


class YesNo(TaskKind):
    name, rank = "yes or no", 4
    protocols = ("generate",)
    max_new_tokens = 16

    def recognizes(self, item: Mapping) -> bool:
        return "image" in item and item.get("label") in LABELS

    def problem(self, item: Mapping) -> str | None:
        return no_text(item, "question")

    def prompt(self, item: Mapping) -> str:
        return asked(item, SHORT)

    def gold(self, item: Mapping) -> str:
        return item["label"]

    def answer(self, text: str, item: Mapping) -> str | None:
        return verdict(text)

    def chance(self, item: Mapping) -> float:
        return 0.5

    def figures(self, items: Sequence[Mapping], records: Sequence[Mapping]) -> dict:
        pairs: dict[object, list[tuple[str, str]]] = {}
        for item, record in zip(items, records, strict=True):
            pairs.setdefault(item.get("category"), []).append((record["answer"], item["label"]))
        figures = rates(pair for part in pairs.values() for pair in part)
        if len(pairs) > 1:
            by_category = {str(name): rates(part) for name, part in pairs.items()}
            figures |= {"f1": sum(one["f1"] for one in by_category.values()) / len(by_category), "by_category": by_category}
        return figures | {"unparsable": sum(says_neither(r["output"]) for r in records) / len(records)}


KINDS = (YesNo(),)
