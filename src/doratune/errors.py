"""One kind of error for everything a user can get wrong.

Every message is one line that names the value and the fix; the command line prints it as it is and exits with status 2.
Invariants of our own are `assert`s, never this.
"""

import difflib
from collections.abc import Iterable


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
