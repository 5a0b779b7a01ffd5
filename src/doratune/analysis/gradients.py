"""What a gradient changes (§4.2): its share along the vectors of W (magnitude) and across them (direction).

For the gradient G of the loss by a weight W (O, I): per row, along = (G·W/w²)·W, across = G − along;

    share = Σ|along|² / Σ|G|²      of a step along G that only stretches

Cost: one pass over G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError


@torch.no_grad()
def magnitude_share(weight: Tensor, gradient: Tensor, magnitude_axis: str = "output") -> float:
    """Share of a gradient (O, I) that changes magnitudes, from 0 (turns only) to 1 (stretches only).

    Raises:
        UserError: shapes that differ, or a gradient of zeros.
    """
    if weight.shape != gradient.shape:
        raise UserError(f"weight and gradient have shapes {tuple(weight.shape)} and {tuple(gradient.shape)}; expected one shape")
    W, G = weight.double().flatten(1), gradient.double().flatten(1)
    if magnitude_axis == "input":
        W, G = W.T, G.T
    total = G.square().sum()
    if not total > 0:
        raise UserError("the gradient is 0; run a backward pass first")
    along = (W * G).sum(1).square() / W.square().sum(1).clamp_min(1e-300)
    return float(along.sum() / total)
