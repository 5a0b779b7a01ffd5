"""The norm of W + s·B·A from its factors, without a product of size O×I.

    output axis   n² = w² + 2s·rowsum(U ⊙ B) + s²·rowsum((B·(A·Aᵀ)) ⊙ B),     U = W·Aᵀ, the base's forward on A's rows
    input axis    n² = w² + 2s·colsum(A ⊙ Q) + s²·colsum(A ⊙ ((Bᵀ·B)·A)),     Q = Bᵀ·W, the base's backward on Bᵀ's rows

and the gradient through it (Eq. 6), which the paper's §4.3 leaves out to save memory; factored, it needs none:

    output axis   c = g·dg/n²    dB −= s·c ⊙ (U + s·B·A·Aᵀ)    dA −= s·((c ⊙ B)ᵀ·W + s·(Bᵀ(c ⊙ B))·A)
    input axis    q = −g·dm/n    dA += s·(Q + s·Bᵀ·B·A) ⊙ q    dB += s·(W·(A ⊙ q)ᵀ + s·B·(A·(A ⊙ q)ᵀ))

Cancellation: U leaves a bf16 base rounded to bf16, so where the terms nearly cancel the sum is noise. Those rows are redone
in fp32 from W's row tiles; the bound below is the error of n² that the rounding of U and of the three sums can cause.

Cost: 2·O·I·R FLOPs at the base's own speed and 2·(O + I)·R² in fp32; memory O·R + R² numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .decomposition import TINY

_ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-24, torch.float64: 2**-53}
"""ε_U: the relative rounding of one element of U as a base of this dtype returns it."""

_TOLERANCE = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 1e-6, torch.float64: 1e-12}
"""Largest share of n² that U's rounding may cause before a row is redone: well below what the output's dtype resolves."""


class Weight(Protocol):
    """The frozen weight W (O, I) as the norm and its gradient ask for it: products, and rows in fp32 (fp64)."""

    dtype: torch.dtype
    """In which products with W are computed."""
    device: torch.device
    exact_forward: bool
    """False where the forward rounds activations too: U then comes from row tiles."""

    def forward_rows(self, rows_KI: Tensor) -> Tensor:
        """rows · Wᵀ (K, O) in W's dtype."""

    def backward_rows(self, rows_KO: Tensor) -> Tensor:
        """rows · W (K, I)."""

    def row_tiles(self, rows: Tensor | None = None) -> Iterator[tuple[Tensor | slice, Tensor]]:
        """(which rows, those rows of W in fp32 or fp64), tile by tile; all rows, or those in the index `rows`."""

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums over processes that have other columns (input axis: rows) of W; `parts` where this one has all."""


class Terms(NamedTuple):
    """n² = w² + 2·cross + ba2 with cross = W·ΔV, ba2 = |ΔV|² per row (or column); `n` has redone rows and the clamp."""

    n: Tensor
    cross: Tensor
    ba2: Tensor
    redone: Tensor
    clamped: Tensor


def stacked(U_LOR: Tensor, A_LRI: Tensor, B_LOR: Tensor, s: float, w2_LO: Tensor, noise: float, tolerance: float):
    """(n (L, O), which layers need `terms` (L,)): the output axis of L layers of one shape in few operations; no zero rows.

    U = W·Aᵀ, A and B as the forward rounds them, all in w²'s dtype; U is overwritten. noise: ε_U, tolerance: see `limits`. A layer
    needs `terms` where one of its rows is in danger of cancellation by the first test there, or is not a number."""
    gram_LRR = A_LRI @ A_LRI.mT
    bound_LO = (B_LOR.square() @ gram_LRR.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).squeeze(-1)
    U_LOR.mul_(B_LOR)
    noise_LO = torch.linalg.vector_norm(U_LOR, dim=-1).mul_(noise * abs(s))
    n2_LO = torch.add(w2_LO, U_LOR.sum(-1), alpha=2 * s)
    n2_LO.add_(torch.matmul(B_LOR, gram_LRR).mul_(B_LOR).sum(-1), alpha=s * s)
    noise_LO.add_(torch.add(w2_LO, bound_LO, alpha=s * s), alpha=_ROUNDING[w2_LO.dtype])
    doubtful_L = ~(noise_LO <= tolerance * n2_LO).all(-1)  # also of NaN
    return n2_LO.sqrt_(), doubtful_L


def limits(W: Weight) -> tuple[float, float]:
    """(ε_U of this weight, the share of n² that it may cause)."""
    return rounding(W), _TOLERANCE[W.dtype]


def terms(W: Weight, A_RI: Tensor, B_OR: Tensor, s: float, w2: Tensor, axis: str, product: Tensor | None = None) -> Terms:
    """The norm and its parts; A already in the dtype that the forward uses, to which B is rounded too; product: U, if it is known.
    No autograd, no autocast.

    Both axes are one sum over rows: P = U, F = B on the output axis, P = (Bᵀ·W)ᵀ, F = Aᵀ on the input axis."""
    if axis == "output":
        product = times_A(W, A_RI) if product is None else product
        P_NR, F_NR, gram = product, B_OR, gram_matrix(A_RI, w2.dtype)
    else:
        P_NR, F_NR, gram = W.backward_rows(B_OR.T).T, A_RI.T, gram_matrix(B_OR.T.to(A_RI.dtype), w2.dtype)
    cross, ba2, product_norm, bound = W.total(*row_sums(P_NR, F_NR, gram, A_RI.dtype))
    cross, ba2 = cross.mul_(s), ba2.mul_(s * s)
    n2 = (w2 + ba2).add_(cross, alpha=2)
    noise = product_norm.mul_(rounding(W) * abs(s))
    # the sums themselves, where B·A cancels within itself: |F_i·G_ij·F_j|₂ ≤ Σ_i F_i²·G_ii, formed exactly only where that matters
    tolerance, own = _TOLERANCE[W.dtype], _ROUNDING[w2.dtype]
    redone = (noise + own * (w2 + s * s * bound) > tolerance * n2).nonzero().squeeze(1)
    if len(redone):
        F2 = F_NR[redone].to(A_RI.dtype).to(w2.dtype).square()
        (exact,) = W.total(((F2 @ gram.square()) * F2).sum(1).sqrt())
        sums = own * (w2[redone] + s * s * exact)
        redone = redone[noise[redone] + sums > tolerance * n2[redone]]
    if len(redone):
        (n2[redone],) = W.total(squared_direct(W, A_RI.to(w2.dtype), B_OR.to(A_RI.dtype), s, axis, redone))
    n, floor = n2.clamp_min(0).sqrt(), TINY * w2.sqrt()
    return Terms(torch.maximum(n, floor), cross, ba2, redone, n < floor)


def row_sums(P_NR: Tensor, F_NR: Tensor, gram_RR: Tensor, low: torch.dtype) -> tuple[Tensor, ...]:
    """Per row Σ P⊙F, Σ (F·G)⊙F, |P⊙F|₂ and Σ F²·G_ii, in G's dtype, with F rounded to `low`; chunk by chunk."""
    parts = []
    for rows in row_chunks(len(P_NR), max(1, len(gram_RR)), P_NR.device):
        F = F_NR[rows].to(low).to(gram_RR.dtype)
        product = P_NR[rows].to(gram_RR.dtype, copy=True).mul_(F)
        cross, product_norm = product.sum(1), torch.linalg.vector_norm(product, dim=1)
        torch.mm(F, gram_RR, out=product)
        parts.append((cross, product.mul_(F).sum(1), product_norm, torch.mul(F, F, out=product) @ gram_RR.diagonal()))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True)) if parts else (gram_RR.new_empty(0),) * 4


def gram_matrix(rows_RK: Tensor, dtype: torch.dtype) -> Tensor:
    """rows · rowsᵀ (R, R) in `dtype`, chunk by chunk."""
    gram = torch.zeros(len(rows_RK), len(rows_RK), dtype=dtype, device=rows_RK.device)
    for columns in row_chunks(rows_RK.shape[1], max(1, len(rows_RK)), rows_RK.device):
        part = rows_RK[:, columns].to(dtype)
        gram.addmm_(part, part.T)
    return gram


def row_chunks(rows: int, width: int, device: torch.device):
    """Slices of rows with at most 2¹⁷ numbers on CPU (half a MiB of fp32), 2²² elsewhere, where each costs launches."""
    step = max(1, (2**17 if device.type == "cpu" else 2**22) // width)
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def rounding(W: Weight) -> float:
    """ε_U of this weight; TF32 products count as what they are, and row tiles as the fp32 that they are in."""
    dtype = W.dtype if W.exact_forward else torch.float32
    if dtype == torch.float32 and W.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return 2**-11
    return _ROUNDING[dtype]


def times_A(W: Weight, A_RI: Tensor) -> Tensor:
    """U = W·Aᵀ (O, R): through the layer's forward, or through row tiles where that forward is not exact."""
    if W.exact_forward:
        return W.forward_rows(A_RI).T
    parts = [tile_KI @ A_RI.to(tile_KI.dtype).T for _, tile_KI in W.row_tiles()]
    return torch.cat(parts) if parts else A_RI.new_empty(0, len(A_RI))


def squared_direct(W: Weight, A: Tensor, B: Tensor, s: float, axis: str, index: Tensor) -> Tensor:
    """|W + s·B·A|² of the rows (columns) in `index`, directly from fp32 row tiles. A in fp32 (fp64)."""
    B = B.to(A.dtype)
    if axis == "output":
        parts = [V.square().sum(1) for _, V in direct_rows(W, A, B, s, index)]
        return torch.cat(parts)
    total = torch.zeros(len(index), dtype=A.dtype, device=A.device)
    for rows, tile_KI in W.row_tiles():
        V = torch.addmm(tile_KI[:, index], B[rows], A[:, index], alpha=s)
        total += V.square().sum(0)
    return total


def direct_rows(W: Weight, A: Tensor, B: Tensor, s: float, index: Tensor | None = None):
    """(rows, W_rows + s·B_rows·A) tile by tile in fp32; also what merging writes."""
    for rows, tile_KI in W.row_tiles(index):
        yield rows, torch.addmm(tile_KI, B[rows], A, alpha=s)


def full_gradient_output(W: Weight, A_RI, B_OR, s, c_O, redone) -> tuple[Tensor, Tensor]:
    """(dA, dB) through the norm, output axis; c = g·dg/n², 0 on rows without direction. U is recomputed here.

    Rows that cancel take V = W + s·B·A from fp32 tiles in both gradients: −s·(c ⊙ B)ᵀ·V and −s·c ⊙ (V·Aᵀ)."""
    A, B = A_RI.to(c_O.dtype), B_OR.to(c_O.dtype)
    VA_OR = torch.addmm(times_A(W, A_RI).to(c_O.dtype), B, A @ A.T, alpha=s)
    cB_OR = c_O[:, None] * B
    cB_plain = cB_OR.index_fill(0, redone, 0.0)
    cBV_RI = torch.addmm(scaled_backward(W, cB_plain.T), B.T @ cB_plain, A, alpha=s)
    for rows, V in direct_rows(W, A, B, s, redone) if len(redone) else ():
        VA_OR[rows] = V @ A.T
        cBV_RI += cB_OR[rows].T @ V
    return -s * cBV_RI, -s * c_O[:, None] * VA_OR


def full_gradient_input(W: Weight, A_RI, B_OR, s, q_I, redone) -> tuple[Tensor, Tensor]:
    """(dA, dB) through the norm, input axis; q = −g·dm/n, 0 on columns without direction. Columns that cancel likewise."""
    A, B = A_RI.to(q_I.dtype), B_OR.to(q_I.dtype)
    BV_RI = torch.addmm(W.backward_rows(B_OR.T).to(q_I.dtype), B.T @ B, A, alpha=s)
    Aq_RI = A * q_I
    Aq_plain = Aq_RI.index_fill(1, redone, 0.0)
    scale = _unit(Aq_plain)
    VAq_OR = times_A(W, Aq_plain / scale).to(q_I.dtype) * scale
    VAq_OR = torch.addmm(VAq_OR, B, A @ Aq_plain.T, alpha=s)
    if len(redone):
        BV_RI[:, redone] = 0.0
        for rows, tile_KI in W.row_tiles():
            V = torch.addmm(tile_KI[:, redone], B[rows], A[:, redone], alpha=s)
            BV_RI[:, redone] += B[rows].T @ V
            VAq_OR[rows] += V @ Aq_RI[:, redone].T
    return s * BV_RI * q_I, s * VAq_OR


def scaled_backward(W: Weight, rows_KO: Tensor) -> Tensor:
    """rows · W, with the rows brought to unit size first: a gradient of 1e-8 would vanish in fp16."""
    scale = _unit(rows_KO)
    return W.backward_rows(rows_KO / scale).to(rows_KO.dtype) * scale


def _unit(rows: Tensor) -> Tensor:
    largest = rows.abs().amax() if rows.numel() else rows.new_ones(())
    return torch.where(largest > 0, largest, 1.0)
