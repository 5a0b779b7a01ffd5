"""One kind of error for everything a user can get wrong.

Every message is one line that names the value and the fix; the command line prints it as it is and exits with status 2.
Invariants of our own are `assert`s, never this.
"""

import difflib
from collections.abc import Iterable, Mapping


class UserError(ValueError):
    """Something that the caller can put right; the message says what and how."""


def near_misses(value: str, known: Iterable[str], count: int = 3) -> str:
    """`"; did you mean 'q_proj', 'o_proj'?"`, or an empty string when nothing known resembles `value`."""
    close = difflib.get_close_matches(str(value), sorted(set(known)), n=count, cutoff=0.5)
    return "; did you mean " + ", ".join(repr(name) for name in close) + "?" if close else ""


def listed(names: Iterable[str], limit: int = 6) -> str:
    """`a, b, c and 4 more`: a list that stays on one line."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def with_article(name: str) -> str:
    """`an Embedding`, `a Linear`, `an LSTM`: a name behind its article; quotation marks around it do not count."""
    plain = name.lstrip("'\"`")
    spelled = len(plain) > 1 and plain[:2].isupper() and plain[0] in "FHLMNRSX"  # el, em, en … where letters are read one by one
    return f"{'an' if plain[:1].lower() in tuple('aeio') or spelled else 'a'} {name}"


def kind_in_words(value: object) -> str:
    """What a value of a file is, in the words of JSON and YAML rather than Python's: `a list`, `an object`, `a whole number`."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    kinds = ((str, "a text"), (int, "a whole number"), (float, "a number"), (list | tuple, "a list"), (Mapping, "an object"))
    return next((words for kind, words in kinds if isinstance(value, kind)), with_article(type(value).__name__))
