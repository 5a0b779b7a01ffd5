"""Holes that loading leaves in glibc's heap, in processes of their own."""

import subprocess
import sys

import pytest

HOLES = """
import ctypes, sys
import torch
from doratune.support.allocator import blocks_apart, keep_freed_memory

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free f".split()]

heap = getattr(ctypes.CDLL(None), "mallinfo2", None)
if heap is None:
    print("no glibc"); sys.exit()
heap.restype = Heap

def load():
    weights, temporary = [], []
    for _ in range(50):
        temporary.append(torch.ones(2**18))  # 1 MiB that goes, between weights that stay
        weights.append(torch.ones(2**15))
    return weights

keep_freed_memory() if "keep" in sys.argv else None
before = heap().free
if "apart" in sys.argv:
    with blocks_apart():
        weights = load()
else:
    weights = load()
holes = heap().free - before
after = heap().arena
block = torch.ones(2**22)
print(holes, heap().arena - after)
"""


def run(*words):
    done = subprocess.run([sys.executable, "-c", HOLES, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    if "no glibc" in done.stdout:
        pytest.skip("another C library")
    return map(int, done.stdout.split())


def test_what_is_loaded_leaves_no_holes_in_a_heap_that_keeps_what_is_freed():
    holes, _ = run("keep")
    assert holes > 40 * 2**20  # as it would be
    holes, later = run("keep", "apart")
    assert holes < 4 * 2**20 and later > 2**23  # afterwards blocks come from the heap again


def test_a_process_that_keeps_nothing_is_left_alone():
    _, later = run("apart")
    assert later < 2**20  # a large block is mapped, as glibc has it
