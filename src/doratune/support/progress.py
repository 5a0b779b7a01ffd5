"""Progress of long work: whoever does it takes `progress`, (label, number of items) → a context manager that gives `advance`.

    with progress("boolq", 3270) as advance:
        advance(32)

`cli/output.py` has the bar of the terminal; left by an error, a bar stays where the work was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Advance = Callable[[int], object]
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextlib.contextmanager
def silent(label: str, total: int) -> Iterator[Advance]:
    """Shows nothing."""
    yield lambda count: None
