"""A and B of the DoRA weight that is nearest to a given one, for a frozen W and a rank:

    W' ≈ m ⊙ (W + B·A)/|W + B·A|,     m = |W'| per row

W' says nothing about |V|, V = W + B·A: each row of V is free in its length. So the fit is over the row scale d too,

    min over d, B, A of  |W' − d ⊙ (W + B·A)|²

by alternation, each step of which lowers it: d from a least-squares fit of each row, then B·A = (rank-R part of W' − d ⊙ W) / d, by
one step of subspace iteration that starts where the last one ended. It starts twice, with a full SVD each: at the best d without
B·A, and at d = 1, that is at the SVD of W' − W, the plain way; the better end is taken, so that it is never worse than that.

Cost: two SVDs of (O, I) in fp32, and for each of at most `STEPS` steps 8·O·I·R FLOPs; memory of some four matrices (O, I).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..math.decomposition import directionless

STEPS = 60
ENOUGH = 1e-4
"""A step that lowers the error by less than this share of it is the last one."""


@dataclass(frozen=True)
class LowRankFit:
    """A (R, I), B (O, R), m (O,) with scaling 1; errors are Frobenius norms: what is missing, and the plain way's."""

    A: Tensor
    B: Tensor
    m: Tensor
    missing: float
    plain_missing: float
    update: float
    norm: float

    @property
    def relative(self) -> float:
        """|W' − fit| / |W' − W|: the share of the update that the adapter misses."""
        return self.missing / self.update if self.update else 0.0

    @property
    def plain_relative(self) -> float:
        return self.plain_missing / self.update if self.update else 0.0


@torch.no_grad()
def fit(W: Tensor, tuned: Tensor, rank: int) -> LowRankFit:
    """The fit of `tuned` (O, I) on W (O, I), both in fp32.

    Rows of W without direction are plain LoRA rows (gain 1), as everywhere: their row of B·A is fitted to W' − W itself."""
    rank = min(rank, *W.shape)
    m, free = tuned.norm(dim=1), ~directionless(W.norm(dim=1))
    plain = low_rank(tuned - W, rank)
    d = row_scale(tuned, W, free)
    ends = [plain, alternate(W, tuned, plain, torch.ones_like(m), free)]
    ends.append(alternate(W, tuned, low_rank(tuned - d[:, None] * W, rank), d, free))
    missing = [(tuned - composed(W, *factors, m, free)).double().norm().item() for factors in ends]
    A, B = balanced(*ends[missing.index(min(missing))])
    return LowRankFit(A, B, m, min(missing), missing[0], (tuned - W).double().norm().item(), tuned.double().norm().item())


def composed(W: Tensor, A: Tensor, B: Tensor, m: Tensor, free: Tensor) -> Tensor:
    """m ⊙ V/|V|, or V where a row is not `free` to have a magnitude."""
    V = W + B @ A
    return torch.where(free[:, None], V * (m / V.norm(dim=1).clamp_min(1e-30))[:, None], V)


def low_rank(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) of the best rank-R part of M."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


def alternate(W: Tensor, tuned: Tensor, start: tuple[Tensor, Tensor], d: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) by alternating over the row scale, which begins at d, and the low-rank part, which begins at A, d ⊙ B."""
    A, B = start  # here B is d ⊙ B until the end
    error = float("inf")
    for _ in range(STEPS):
        d = row_scale(tuned, W + (B / d[:, None]) @ A, free)
        M = tuned - d[:, None] * W
        Q = torch.linalg.qr(M @ A.T).Q
        A = torch.linalg.qr((Q.T @ M).T).Q.T
        B = M @ A.T
        last, error = error, (M.square().sum() - B.square().sum()).clamp_min(0).item()  # rows of A are orthonormal
        if last - error <= ENOUGH * error:
            break
    return A, B / d[:, None]


def row_scale(tuned: Tensor, V: Tensor, free: Tensor) -> Tensor:
    """d (O,) of the least-squares fit of each row of `tuned` by d·V; 1 on rows that are not free; positive, as m/|V| is."""
    d = (tuned * V).sum(1) / V.square().sum(1).clamp_min(1e-30)
    length = tuned.norm(dim=1) / V.norm(dim=1).clamp_min(1e-30)
    d = torch.where(d > 0.05 * length, d, length)
    return torch.where(free & (d > 0), d, torch.ones_like(d))


def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, with as much of it in A as in B."""
    Qa, Ra = torch.linalg.qr(A.T)
    Qb, Rb = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    root = S.sqrt()
    return (root[:, None] * Vh) @ Qa.T, (Qb @ U) * root
