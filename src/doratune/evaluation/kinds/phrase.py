"""A question about an image with one right word or phrase (GQA, easy-vqa): equal after lower case and the full stop's removal.

GQA's own evaluation compares letter for letter what LLaVA's script has brought into that form. An empty output is unparsable.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..vqa import cleaned
from . import TaskKind, no_text
from .soft_answers import SHORT, asked


def plain(text: str) -> str:
    """Lower case on one line, without a full stop at the end."""
    return cleaned(text).rstrip(".").strip().lower()


class Phrase(TaskKind):
    name, rank = "phrase", 5
    protocols = ("generate",)
    max_new_tokens = 32

    def recognizes(self, item: Mapping) -> bool:
        return "image" in item and "question" in item and isinstance(item.get("answer"), str) and bool(plain(item["answer"]))

    def problem(self, item: Mapping) -> str | None:
        return no_text(item, "question")

    def prompt(self, item: Mapping) -> str:
        return asked(item, SHORT)

    def gold(self, item: Mapping) -> str:
        return plain(item["answer"])

    def answer(self, text: str, item: Mapping) -> str | None:
        return plain(text) or None


KINDS = (Phrase(),)
