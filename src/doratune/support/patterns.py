"""Regular expressions that come from a file or a recipe: valid, and never longer at work than a few seconds.

`re` searches some patterns for ever (`(a+)+b` on a long name). What is a pattern is decided by `re`; the search runs in the engine
of the package `regex`, which stops when its time is up.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from functools import lru_cache

import regex

from ..errors import UserError

SECONDS = 2.0
"""Search time of one pattern over all the names of a model; ordinary ones need a millisecond."""


@lru_cache(maxsize=1024)
def _compiled(pattern: str):
    re.compile(pattern)
    return regex.compile(pattern)


class NamePattern:
    """One pattern, asked of many names.

    Raises:
        UserError: it is no valid regular expression; in `matches`: the search takes too long. `where` is what the message names.
    """

    def __init__(self, pattern: str, where: str):
        self.pattern, self.where, self.spent = pattern, where, 0.0
        try:
            self.expression = _compiled(pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise UserError(f"{where}: {_short(pattern)} is not a valid regular expression: {error}") from None

    def matches(self, name: str) -> bool:
        """Does it match the whole name?"""
        started = time.perf_counter()
        try:
            return self.expression.fullmatch(name, timeout=max(SECONDS - self.spent, 1e-3)) is not None
        except TimeoutError:
            problem = f"the regex {_short(self.pattern)} backtracks without end on {name!r}"
            raise UserError(f"{self.where}: {problem}; write it without nested repetitions") from None
        finally:
            self.spent += time.perf_counter() - started


def is_name(pattern: object) -> bool:
    """Is a text a module's name or the end of one, `q_proj` or `self_attn.q_proj`, rather than a regular expression?"""
    return isinstance(pattern, str) and re.fullmatch(r"[\w-]+(\.[\w-]+)*", pattern) is not None


def excluding(exclude: str | tuple[str, ...], names: Iterable[str]) -> str:
    """A pattern of what was excluded and of all that lies in the modules of these names.

    Args:
        exclude: a regular expression, or names and suffixes, as AdapterConfig has them.
    """
    if isinstance(exclude, str):
        before = [f"(?:{NamePattern(exclude, 'exclude').pattern})"] if exclude else []
    else:
        before = [rf"(?:.*\.)?{re.escape(entry)}" for entry in exclude]
    inside = "|".join(re.escape(name) for name in names)
    return "|".join([*before, rf"(?:{inside})(?:\..*)?"] if inside else before)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 200 else pattern[:200] + "…")
