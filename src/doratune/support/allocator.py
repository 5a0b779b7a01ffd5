"""glibc's heap: what happens to memory that is freed. Elsewhere nothing is changed.

A command keeps it, since on CPU page faults cost a third of a step. While a model is loaded or merged that is wrong: weights that
stay are laid between temporary ones, and the holes are too small for what comes next: 456 MiB of them after SmolLM2-135M in nf4, 87
to 101 MB of heap in a merge of shards of 53. So blocks lie apart then, each in pages of its own that go back when it is freed.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: -1}
"""Never trimmed: the largest value of the threshold, 2 GiB, was reached by some arms of a benchmark and not by others."""
APART = 1 << 16
"""Bytes from which on a block has pages of its own."""

_kept: list[bool] = []
"""Does this process keep what is freed? It is one process's heap, whatever model lies in it."""


def keep_freed_memory() -> None:
    """Keep freed blocks instead of returning each to the system, from now on."""
    _kept[:] = [_set(KEPT)]


@contextlib.contextmanager
def blocks_apart() -> Iterator[None]:
    """Within, blocks lie apart, where the process keeps what is freed otherwise; glibc's own way already returns large ones."""
    if not any(_kept):
        yield
        return
    _set({M_MMAP_THRESHOLD: APART})
    try:
        yield
    finally:
        _set(KEPT)


def _set(values: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all([mallopt(setting, value) for setting, value in values.items()])
