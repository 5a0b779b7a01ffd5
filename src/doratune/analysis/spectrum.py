"""Singular values of an update (O, I), how many of them count, and what they are next to |W|.

What "the update" is:

    adapter (LoRA, DoRA, …)     s·B·A, the direction's update ΔV; what DoRA's gains m/|V| do besides is in the figures on m
    dense weights               W_t − W_0 (full fine-tuning, merged models), which holds both

The values of s·B·A are those of s·R_B·R_Aᵀ, with B = Q_B·R_B and Aᵀ = Q_A·R_A: two QR factorizations of K columns and an SVD of
K × K. Those of a dense difference take some O·I·min(O, I) operations in fp32 and a temporary of the weight's size for each weight,
which for a model of billions of parameters is the longest part of an analysis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 256
"""Singular values that are kept of one weight; the effective rank counts all."""


@dataclass(frozen=True)
class Spectrum:
    """The largest singular values of one weight's update, |W_0| (Frobenius), and the effective rank."""

    values: tuple[float, ...]
    norm: float
    effective_rank: float


@torch.no_grad()
def update_spectrum(layer) -> Tensor:
    """Singular values of ΔV (K,) in float64, largest first; empty for magnitude only. Not for a batch of experts: one of them."""
    weight = getattr(layer, "adapted", layer)
    A, B = weight.low_rank()
    if A is None:
        return torch.empty(0, dtype=torch.float64)
    small = torch.linalg.qr(B.double(), mode="r").R @ torch.linalg.qr(A.double().T, mode="r").R.T
    return abs(weight.scaling) * torch.linalg.svdvals(small)


@torch.no_grad()
def difference_spectrum(before: Tensor, after: Tensor) -> Tensor:
    """Singular values of W_t − W_0 for two dense weights, largest first, in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    return torch.linalg.svdvals(after.flatten(1).to(dtype) - before.flatten(1).to(dtype))


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalized singular values (Roy & Vetterli, 2007); 0 for no update."""
    share = values[values > 0] / values.sum().clamp_min(1e-300)
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def summarized(values: Tensor, norm: float) -> Spectrum:
    """What is kept of a spectrum."""
    return Spectrum(tuple(values[:LARGEST].tolist()), norm, effective_rank(values.double()))
