"""Measure and dispatch: each shape is run in every implementation once, timed on the device, and the fastest is kept.

The key holds the operation, the shape with its rows rounded up to a power of two, dtype and device. Cost: four runs of each
implementation at the first call of a shape; none while a CUDA graph is being captured (the first implementation then).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_chosen: dict[tuple, int] = {}

RUNS = 3


def call(operation: str, shape: tuple, tensor: Tensor, candidates: tuple[Callable, ...], arguments: tuple = (), clock=None):
    """The result of the fastest candidate; all give the same values. `clock(run)` → seconds, by default CUDA events."""
    rows, *rest = shape
    key = operation, (max(rows, 1) - 1).bit_length(), *rest, tensor.dtype, tensor.device
    if key not in _chosen:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return candidates[0](*arguments)
        seconds = [(clock or _device_seconds)(lambda run=run: run(*arguments)) for run in candidates]
        _chosen[key] = seconds.index(min(seconds))
    return candidates[_chosen[key]](*arguments)


def _device_seconds(run: Callable[[], object]) -> float:
    run()  # compiles
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(RUNS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / RUNS
