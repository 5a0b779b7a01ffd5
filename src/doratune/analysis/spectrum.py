"""Singular values of an adapter's update s·B·A (O, I), from its factors: those of R_B·R_Aᵀ, with B = Q_B·R_B and Aᵀ = Q_A·R_A.

Cost: two QR factorizations of K columns and an SVD of K × K.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_spectrum(layer) -> Tensor:
    """Singular values of ΔV (K,) in float64, largest first; empty for magnitude only. Not for a batch of experts: one of them."""
    A, B = layer.adaptation.factors_of(layer)
    if A is None:
        return torch.empty(0, dtype=torch.float64)
    small = torch.linalg.qr(B.double(), mode="r").R @ torch.linalg.qr(A.double().T, mode="r").R.T
    return abs(layer.adaptation.scaling) * torch.linalg.svdvals(small)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalized singular values (Roy & Vetterli, 2007); 0 for no update."""
    share = values[values > 0] / values.sum().clamp_min(1e-300)
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0
