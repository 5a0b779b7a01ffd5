"""Ratings and winners in what a judge says, as FastChat reads them: the first `[[7]]`, else `[7]`; `[[A]]`, `[[B]]`, `[[C]]`.

A rating outside of 1 to 10, and a text without one, is unparsable: it is in no mean, and counted.
"""

from __future__ import annotations

import re

LOWEST, HIGHEST = 1, 10
UNPARSABLE = -1
"""As the published files have it."""
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


def rating(text: str) -> float | None:
    """The rating in a judgment; None where there is none."""
    match = next((m for pattern in _RATINGS if (m := pattern.search(text))), None)
    value = float(match[1]) if match else None
    return value if value is not None and LOWEST <= value <= HIGHEST else None


def winner(text: str) -> str | None:
    """A, B or tie; None where the judgment names none."""
    return next((name for mark, name in (("[[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie")) if mark in text), None)
