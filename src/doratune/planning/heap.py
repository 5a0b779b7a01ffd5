"""What an allocator holds where a log of allocations needs less: freed blocks lie between others and are too small for the next.

A heap that grows at its end, takes the smallest free block that is large enough, joins free neighbours and gives nothing back:
glibc as the commands set it (`cli/output.py`), where no block is mapped by itself. A block must exceed what is asked for by the
slack of an aligned request, so that a block that was freed is too small for the same request again, unless its neighbour is free.
Cost: a few microseconds an allocation.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable

from .log import ADAPTERS, FACTORS, OPTIMIZER, WEIGHTS, Allocation

LASTING = (WEIGHTS, ADAPTERS, FACTORS, OPTIMIZER)
"""What stays from step to step."""

ALIGNMENT, OVERHEAD, SLACK = 64, 16, 96


def heap_bytes(storages: Iterable[Allocation], repeated: int = 2) -> int:
    """The heap's size after the log was replayed `repeated` times; what is never freed is allocated once."""
    heap, lasting, events = _Heap(), [], []
    for number, s in enumerate(storages):
        if s.death is None and s.kind in LASTING:
            lasting.append(s.size)
        else:
            death = math.inf if s.death is None else s.death + 0.5
            events += [(s.birth, 1, number, s.size), (death, 0, number, s.size)]
    for size in lasting:
        heap.take(size)
    events.sort(key=lambda event: (event[0], event[1]))
    for _ in range(repeated):
        places: dict[int, tuple[int, int]] = {}
        for _, born, number, size in events:
            if born:
                places[number] = heap.take(size)
            else:
                heap.free(*places.pop(number))
    return heap.end


class _Heap:
    """Free blocks as (size, start), and where each starts and ends."""

    def __init__(self):
        self.end = 0
        self.by_size: list[tuple[int, int]] = []
        self.starts: dict[int, int] = {}
        self.ends: dict[int, int] = {}

    def take(self, size: int) -> tuple[int, int]:
        size = -(-(size + OVERHEAD) // ALIGNMENT) * ALIGNMENT
        place = bisect.bisect_left(self.by_size, (size + SLACK, -1))
        if place < len(self.by_size):
            whole, start = self.by_size[place]
            self._forget(start, whole)
            if whole > size:
                self._add(start + size, whole - size)
            return start, size
        if self.end in self.ends:  # the free block at the end grows
            start = self.ends[self.end]
            self._forget(start, self.starts[start])
        else:
            start = self.end
        self.end = start + size
        return start, size

    def free(self, start: int, size: int) -> None:
        if start in self.ends:
            before = self.ends[start]
            size += self.starts[before]
            self._forget(before, self.starts[before])
            start = before
        if start + size in self.starts:
            behind = self.starts[start + size]
            self._forget(start + size, behind)
            size += behind
        self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        self.starts[start], self.ends[start + size] = size, start
        bisect.insort(self.by_size, (size, start))

    def _forget(self, start: int, size: int) -> None:
        del self.starts[start], self.ends[start + size]
        self.by_size.pop(bisect.bisect_left(self.by_size, (size, start)))
