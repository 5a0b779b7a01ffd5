"""The allocator held still, before the first arm is built: what freed memory does is then the same for every arm.

Left alone, glibc gives memory back to the system once some threshold is passed, and the next step faults it in again: one arm of
a comparison went over the threshold and another did not, which read as 130 ms of a step (docs/log.md). Here nothing is given
back: blocks of every size come from the heap, and the heap is never trimmed. It costs memory: the process stays at its peak.
"""

from __future__ import annotations

import ctypes
import functools

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
SETTINGS = {M_MMAP_THRESHOLD: 1 << 30, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
"""Without M_MMAP_MAX blocks above 1 GiB would still be mapped and given back; a trim threshold of −1 means never."""


@functools.cache
def hold_still() -> bool:
    """Tell glibc to keep what is freed; False where the C library is another one, and then nothing is changed. Once a process."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(setting, value) for setting, value in SETTINGS.items()])
