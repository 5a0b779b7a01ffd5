"""Magnitude and direction of a frozen weight (Eq. 2), and which of its rows have no direction.

    w_o = |W_o|            per output row, or per input column on the input axis
    m   = w at the start, so that W' = W exactly

Zero and tiny rows are decided once, from the frozen weight alone: w <= 1e-6 · median(w). Such a row keeps g = 1 for good and
is a plain LoRA row. (A test on the current norm would freeze the row after its first step; an epsilon would give it a
gain of some hundreds.) Real checkpoints have hundreds of such rows.

Cost: one pass over W in row tiles of fp32; keeps O (or I) numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-6
"""A row below this share of the median norm has no usable direction."""


def squared_norms(tiles, length: int, axis: str, dtype: torch.dtype, device) -> Tensor:
    """w² per output row (O,) or input column (I,), from row tiles of W; each product and sum in fp32 or fp64."""
    total = torch.zeros(length, dtype=dtype, device=device)
    for rows, tile_KI in tiles:
        if axis == "output":
            total[rows] = tile_KI.square().sum(1)
        else:
            total += tile_KI.square().sum(0)
    return total


def directionless(w: Tensor) -> Tensor:
    """True where a row's norm is at most 1e-6 of the median: zero rows always, also where most rows are zero."""
    return w <= TINY * w.median() if w.numel() else torch.zeros_like(w, dtype=torch.bool)
