"""Which training items ask what a test set asks: the same words, or most of their sequences of words.

Questions are compared in lower case without punctuation. Near: at least NEAR of a test question's sequences of WORDS words stand in
one training item; sequences that several test questions share (the task's own phrases) do not count. Source: the n-gram overlap by
which contamination is usually measured (GPT-3 report, appendix C). Cost: a dictionary of the test set's sequences, one pass over
the items.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

WORDS, NEAR, SHARED = 5, 0.8, 2
"""Words in a sequence; the share of them that is near; how many test questions may share one that counts."""


class TestQuestions:
    """The questions of a test set, with the place of each."""

    __test__ = False

    def __init__(self, questions: Iterable[tuple[str, str]]):
        self.whole: dict[tuple[str, ...], str] = {}
        self.places: list[str] = []
        holders: dict[tuple[str, ...], list[int]] = {}
        for place, text in questions:
            words = _words(text)
            self.whole.setdefault(words, place)
            for sequence in set(_sequences(words)):
                holders.setdefault(sequence, []).append(len(self.places))
            self.places.append(place)
        self.holders = {sequence: found for sequence, found in holders.items() if len(found) <= SHARED}
        self.sizes = Counter(number for found in self.holders.values() for number in found)

    def met_by(self, text: str) -> tuple[str, str] | None:
        """("the same" or "nearly the same", place of the test question) for a training question; None where none is met."""
        words = _words(text)
        if (place := self.whole.get(words)) is not None:
            return "the same", place
        hits = Counter(number for sequence in set(_sequences(words)) for number in self.holders.get(sequence, ()))
        near = [(count / self.sizes[number], number) for number, count in hits.items() if count >= NEAR * self.sizes[number]]
        return ("nearly the same", self.places[max(near)[1]]) if near else None


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def _sequences(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (words[i : i + WORDS] for i in range(len(words) - WORDS + 1))
