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


def gain_minus_one(m: Tensor, n: Tensor, frozen: Tensor | None) -> Tensor:
    """g − 1 = (m − n)/n, exactly 0 where m = n, 0 on rows without direction (frozen None: there are none)."""
    if frozen is None:
        return (m - n) / n
    return torch.where(frozen, 0.0, (m - n) / torch.where(frozen, 1.0, n))


def movement(m: Tensor, n: Tensor, w2: Tensor, cross: Tensor, ba2: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
    """How far a layer moved: (|m − w|/w, 1 − cos(W + ΔV, W)) per row (§3.2, Eq. 3 and 4), without a dense ΔV.

    `cross` = W·ΔV and `ba2` = |ΔV|² per row. 1 − cos comes from the sine, sin² = (w²·ba2 − cross²)/(w²·n²), because the
    cosine itself is 1 to seven digits for a small update.
    """
    keep = ~frozen
    w2, cross, ba2, n = w2[keep], cross[keep], ba2[keep], n[keep]
    w = w2.sqrt()
    sine2 = ((w2 * ba2 - cross.square()) / (w2 * n.square())).clamp(0, 1)
    cosine = (w2 + cross) / (w * n)
    return (m[keep] - w).abs() / w, torch.where(cosine > 0, sine2 / (1 + cosine), 1 - cosine)
