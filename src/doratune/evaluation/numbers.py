"""Numbers in a text: ours and the published scripts' reading of "1,234.50", "−3", "½", "the answer is 4.".

`last_number` reads English notation, as a person would:

    1,234.50   1234.5    a comma (or a no-break or thin space) between groups of three digits; any other comma ends a number
    −3, -$3    -3        a hyphen, minus or dash is a sign where no letter, digit or closing bracket stands before it
    ½, 2½      0.5, 2.5  fractions of one character, also behind a whole number
    3/4, 1 1/2 0.75, 1.5 fractions of digits without spaces around the stroke; a denominator of zero is none
    1.5e3      1500      an exponent behind a number
    4., 50 %   4, 50     a full stop that ends a sentence, a currency and a percent sign are not read
    twelve     none      words are no numbers; a number beyond the largest float is none either

`published_number` is the rule of LLM-Adapters' script: commas are taken out of the whole text, then the last match of a sign,
digits and decimals. It reads −3 as 3, ½ as nothing, 3/4 as 4 and 5-3 as -3.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator

TOLERANCE = 0.001
"""Of LLM-Adapters' script: answers that differ by no more are the same."""

_PUBLISHED = re.compile(r"-?\d+\.?\d*")
_VULGAR = "¼-¾⅐-⅞↉"
_NUMBER = re.compile(
    rf"""
    (?P<minus> (?<! [\w)\]}}] ) [-−－﹣–] (?= [$€£¥₹]? \.? [\d{_VULGAR}] ) )?
    [$€£¥₹]?
    (?:
        (?: (?P<mixed> \d+ ) [ ] )? (?P<top> \d+ ) [/⁄] (?P<bottom> \d+ ) (?! [\d.,]*[/⁄]? \d )
      | (?P<whole> \d{{1,3}} (?: [,\u00a0\u202f\u2009] \d{{3}} )+ (?! \d ) | \d+ )?
        (?: [ ]? (?P<vulgar> [{_VULGAR}] )
          | (?P<decimals> \. \d+ )? (?: [eE] (?P<power> [+-]? \d{{1,4}} ) (?! \w ) )? )
    )
    """,
    re.VERBOSE,
)


def numbers(text: str) -> Iterator[tuple[float, int, int]]:
    """(value, start, end) of each number in a text, in order."""
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None and math.isfinite(value):
            yield value, match.start(), match.end()


def last_number(text: str) -> float | None:
    """The last number in a text; None where there is none."""
    return next((value for value, _, _ in reversed(list(numbers(text)))), None)


def number_of(text: object) -> float | None:
    """The value of a text that is a number and nothing else, or of a number; None for anything else."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        try:
            return float(text) if math.isfinite(text) else None
        except OverflowError:
            return None
    if not isinstance(text, str):
        return None
    stripped = text.strip()
    return next((value for value, start, end in numbers(stripped) if (start, end) == (0, len(stripped))), None)


def published_number(text: str) -> float | None:
    """The last number as LLM-Adapters' script finds it; None where there is none."""
    matches = _PUBLISHED.findall(text.replace(",", ""))
    return float(matches[-1]) if matches else None


def same(a: float | None, b: float | None) -> bool:
    """Do two numbers count as one answer?"""
    return a is not None and b is not None and abs(a - b) <= TOLERANCE


def shown(value: float | None) -> str | None:
    """A number as records show it."""
    return None if value is None else repr(value).removesuffix(".0")


def _value(match: re.Match) -> float | None:
    sign = -1.0 if match["minus"] else 1.0
    if match["top"]:
        return _fraction(match, sign)
    if not (match["whole"] or match["vulgar"] or match["decimals"]):
        return None
    digits = re.sub(r"[^\d]", "", match["whole"] or "0")
    value = float(digits + (match["decimals"] or "") + (f"e{match['power']}" if match["power"] else ""))
    return sign * (value + (unicodedata.numeric(match["vulgar"]) if match["vulgar"] else 0.0))


def _fraction(match: re.Match, sign: float) -> float | None:
    whole, top, bottom = (float(match[name] or 0) for name in ("mixed", "top", "bottom"))
    return sign * (whole + top / bottom) if bottom else None
