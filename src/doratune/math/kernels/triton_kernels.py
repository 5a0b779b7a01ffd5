"""The adapted output, its backward and the direct norm as one Triton kernel each (CUDA; bf16, fp16, fp32).

    compose            y = g ⊙ out + shift + z·sBᵀ         shift = (1 − g) ⊙ bias, z = x·Aᵀ (T, R), sB = s·g ⊙ B (O, R)
    compose_backward   gdY = g ⊙ dY,   dot = Σ_T dY ⊙ (kept − bias)                          kept = the forward's y or `out`
    direct_norm        n_o = |W_o + s·B_o·A|                       the norm of Eq. 5 without the terms that can cancel

(Eq. 5, 7, 11.) Everything is computed in fp32 and rounded once, products of two fp32 tensors included ("ieee", no TF32);
With g = 1, shift = 0 and sB = 0, y equals `out` (−0 becomes 0).
Sums go through a small buffer of partial sums, no atomics: the same input gives the same bits.

Cost: every large tensor is read once and written once: compose 2·T·O numbers of traffic and 2·T·O·R FLOPs, backward 3·T·O,
norm O·I and 2·O·I·R FLOPs. The low-rank product and W + s·B·A live in registers, tile by tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8
"""Neighbouring programs of compose walk down this many row blocks of one column block: its part of sB stays in L2."""

BACKWARD_TILE = (32, 128)
"""Rows and columns of one step of the backward: 256 contiguous bytes per row in a low precision."""

PROGRAMS = 1024
"""Programs of the backward at most: a few for each of a large GPU's SMs; the partial sums stay below 1 MB."""

OPTIONS = {"num_warps": 8, "num_stages": 2}
"""With the tiles below at most 32 fp32 sums per thread: 150 registers and 32 bytes of stack at most, sm_80 to sm_120."""


class Tile(NamedTuple):
    """rows × columns of the result, and the part of R multiplied at once; powers of two from 16, as `tl.dot` wants."""

    rows: int
    columns: int
    ranks: int


def tile(rows: int, R: int, dtype: torch.dtype) -> Tile:
    """64 × 128 and all of R up to 64 at once; less in fp32, which has no tensor cores here, and for few rows (decoding)."""
    few, ranks = rows <= 16, max(16, triton.next_power_of_2(R))
    if dtype == torch.float32:
        return Tile(16 if few else 32, 64, min(ranks, 32))
    return Tile(16 if few else 64, 64 if few else 128, min(ranks, 64))


def splits(T: int, O: int) -> int:
    """Partial sums per column in the backward: as many as give `PROGRAMS` programs, one step of rows each at least."""
    rows, columns = BACKWARD_TILE
    return max(1, min(triton.cdiv(T, rows), PROGRAMS // triton.cdiv(O, columns)))


def compose(out_TO: Tensor, g_O: Tensor | None, shift_O: Tensor | None, z_TR: Tensor | None, sB_OR: Tensor | None) -> Tensor:
    """y (T, O), contiguous, in out's dtype; g None: LoRA; z and sB in out's dtype or None (magnitude only)."""
    T, O = out_TO.shape
    y_TO = out_TO.new_empty(T, O)
    if y_TO.numel() == 0:
        return y_TO
    R = 0 if z_TR is None else z_TR.shape[1]
    size = tile(T, R, out_TO.dtype)
    grid = (triton.cdiv(T, size.rows) * triton.cdiv(O, size.columns),)
    low_rank = (_dense(z_TR), _dense(sB_OR)) if R else (None, None)
    with torch.cuda.device_of(out_TO):
        _compose_kernel[grid](
            y_TO, out_TO, _dense(g_O), _dense(shift_O), *low_rank, T, O, *out_TO.stride(), R, *size, GROUP, **OPTIONS,
        )  # fmt: skip
    return y_TO


def compose_backward(dY_TO: Tensor, kept_TO: Tensor, g_O: Tensor | None, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
    """(g ⊙ dY (T, O) in dY's dtype, Σ_T dY ⊙ (kept − bias) (O,) in fp32); without g the first is dY itself."""
    T, O = dY_TO.shape
    gdY_TO = dY_TO if g_O is None else dY_TO.new_empty(T, O)
    if dY_TO.numel() == 0:
        return gdY_TO, dY_TO.new_zeros(O, dtype=torch.float32)
    partial_SO = dY_TO.new_empty(splits(T, O), O, dtype=torch.float32)
    rows, columns = BACKWARD_TILE
    with torch.cuda.device_of(dY_TO):
        _backward_kernel[triton.cdiv(O, columns), len(partial_SO)](
            gdY_TO, partial_SO, dY_TO, kept_TO, _dense(g_O), _dense(bias_O), T, O,
            *dY_TO.stride(), *kept_TO.stride(), rows, columns, **OPTIONS,
        )  # fmt: skip
    return gdY_TO, partial_SO.sum(0)


def direct_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, s: float) -> Tensor:
    """|W_o + s·B_o·A| (O,) in fp32; A and B in W's dtype, W with any strides."""
    O, I = W_OI.shape
    R = len(A_RI)
    size = tile(O, R, W_OI.dtype)
    partial_OS = W_OI.new_empty(O, triton.cdiv(I, size.columns), dtype=torch.float32)
    if partial_OS.numel() > 0:
        with torch.cuda.device_of(W_OI):
            _norm_kernel[partial_OS.shape[1], triton.cdiv(O, size.rows)](
                partial_OS, W_OI, _dense(A_RI), _dense(B_OR), float(s), O, I, *W_OI.stride(), R, *size, **OPTIONS,
            )  # fmt: skip
    return partial_OS.sum(1).sqrt()


def _dense(t: Tensor | None) -> Tensor | None:
    """The small operands, contiguous: they almost always are."""
    return None if t is None else t.contiguous()


@triton.jit(do_not_specialize=["T"])
def _compose_kernel(
    y, out, g, shift, z, sB, T, O, out_t, out_o,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of y; out_t, out_o: out's strides. Tiles in groups of GROUP row blocks, down the rows first."""
    tiles_T, tiles_O = tl.cdiv(T, ROWS), tl.cdiv(O, COLUMNS)
    first = tl.program_id(0) // (GROUP * tiles_O) * GROUP
    inside, height = tl.program_id(0) % (GROUP * tiles_O), min(tiles_T - first, GROUP)
    t = (first + inside % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = (inside // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (t < T)[:, None] & (o < O)[None, :]
    out_TO = tl.load(out + t[:, None] * out_t + o[None, :] * out_o, mask=mask, other=0.0).to(tl.float32)
    y_TO = out_TO
    if g is not None:
        y_TO *= tl.load(g + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        if shift is not None:
            y_TO += tl.load(shift + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    if z is not None:
        low_TO = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, R, RANKS):
            r = start + tl.arange(0, RANKS)
            z_TR = tl.load(z + t[:, None] * R + r[None, :], mask=(t < T)[:, None] & (r < R)[None, :], other=0.0)
            sB_RO = tl.load(sB + o[None, :] * R + r[:, None], mask=(o < O)[None, :] & (r < R)[:, None], other=0.0)
            low_TO = tl.dot(z_TR, sB_RO, low_TO, input_precision="ieee")
        y_TO += low_TO
    tl.store(y + t[:, None] * O + o[None, :], y_TO.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(gdY, partial, dY, kept, g, bias, T, O, dY_t, dY_o, kept_t, kept_o, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One block of columns, every num_programs(1)-th block of rows; one row of partial sums. dY_t, …: strides."""
    o = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    if g is not None:
        g_O = tl.load(g + o, mask=o < O, other=0.0).to(tl.float32)
    if bias is not None:
        bias_O = tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)
    sum_TO = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(tl.program_id(1) * ROWS, T, tl.num_programs(1) * ROWS):
        t = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (t < T)[:, None] & (o < O)[None, :]
        dY_TO = tl.load(dY + t[:, None] * dY_t + o[None, :] * dY_o, mask=mask, other=0.0).to(tl.float32)
        kept_TO = tl.load(kept + t[:, None] * kept_t + o[None, :] * kept_o, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            kept_TO -= bias_O[None, :]
        sum_TO += dY_TO * kept_TO
        if g is not None:
            gdY_TO = g_O[None, :] * dY_TO
            tl.store(gdY + t[:, None] * O + o[None, :], gdY_TO.to(gdY.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(1).to(tl.int64) * O + o, tl.sum(sum_TO, axis=0), mask=o < O)


@triton.jit
def _norm_kernel(
    partial, W, A, B, s, O, I, W_o, W_i, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr
):
    """Squares of one tile of W + s·B·A summed along its rows; W_o, W_i: W's strides."""
    o = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    BA_OI = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, R, RANKS):
        r = start + tl.arange(0, RANKS)
        B_OR = tl.load(B + o[:, None] * R + r[None, :], mask=(o < O)[:, None] & (r < R)[None, :], other=0.0)
        A_RI = tl.load(A + r[:, None] * I + i[None, :], mask=(r < R)[:, None] & (i < I)[None, :], other=0.0)
        BA_OI = tl.dot(B_OR, A_RI, BA_OI, input_precision="ieee")
    mask = (o < O)[:, None] & (i < I)[None, :]
    V_OI = tl.load(W + o[:, None] * W_o + i[None, :] * W_i, mask=mask, other=0.0).to(tl.float32) + s * BA_OI
    tl.store(partial + o * tl.num_programs(0) + tl.program_id(0), tl.sum(V_OI * V_OI, axis=1), mask=o < O)
