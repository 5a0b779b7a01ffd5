"""The adapted output from the base's output: forward and hand-written backward.

    output axis   y = out + (g − 1) ⊙ (out − bias) + (x·Aᵀ)·(s·g ⊙ B)ᵀ          out = the base's own output
                  P = dYᵀ·(x·Aᵀ);  dg = Σ_T dY ⊙ (out − bias) + s·rowsum(B ⊙ P);  dm = dg/n
                  dB = s·g ⊙ P;  dZ = dY·(s·g ⊙ B);  dA = dZᵀ·x;  dx = dZ·A;  dout = g ⊙ dY
    LoRA          the same with g = 1 and no m; magnitude only: the same without A and B
    input axis    x̃ = x + (g − 1) ⊙ x in front of the base and of a plain low-rank update; dm = Σ_T dx̃ ⊙ x / n

(Eq. 5, 7, 11; Eq. 6 through `norm.full_gradient_*`.) The scale goes into B's rows, which are tiny, so the low-rank output
is never written and read back: two passes over the output. It enters as g − 1, formed in fp32, because bf16 resolves g near
1 to only 0.4 %; with B = 0 and the initial m, y equals the base's output bit for bit.

Cost over the base: 2·T·R·(I + O) FLOPs forward, twice that backward; kept for backward: x, the base's output (only if
m is trained), T·R and O numbers. Once differentiable.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import norm
from .decomposition import gain_minus_one

SMALL_GAIN = 0.25
"""Below this g, g − 1 in a low precision would be off by more than the result's own rounding."""

CHUNK_NUMBERS = 2**18


class Site(Protocol):
    """The layer as the op sees it: scaling, its base, and its cached norm."""

    scaling: float
    full_gradient: bool
    frozen: Tensor  # rows (columns) without direction, bool

    def norm(self, A: Tensor | None, B: Tensor | None, dtype: torch.dtype, tokens: int) -> Tensor: ...
    def redone(self, A: Tensor, B: Tensor) -> Tensor: ...


class Compose(Function):
    """y (T, O) from the base's output; A, B None: magnitude only; m None: LoRA.

    Callers flatten and view outside: a view made in here could not be changed in place by a later op (`relu_`)."""

    @staticmethod
    def forward(ctx, x, out, A, B, m, bias, site: Site) -> Tensor:
        """x (T, I) input of the low-rank branch, out (T, O), A (R, I), B (O, R), m (O,) fp32, bias (O,) or None."""
        with no_autocast(out.device):
            n = gain = None
            if m is not None:
                n = site.norm(A, B, out.dtype, len(out)).clone()
                gain = gain_minus_one(m, n, site.frozen)
            y = scale_rows(out, gain, bias)
            z_TR = None
            if A is not None:
                z_TR = x.to(out.dtype) @ A.to(out.dtype).T
                y = torch.addmm(y, z_TR, scaled_B(B, gain, site.scaling, out.dtype).T)
        need_x, _, need_A, need_B, need_m = ctx.needs_input_grad[:5]
        need_dg = need_m or (site.full_gradient and m is not None and (need_A or need_B))
        ctx.site, ctx.need_dg = site, need_dg
        ctx.save_for_backward(x if need_A else None, out if need_dg else None, z_TR, A, B, m, n, bias)
        ctx.x_dtype = None if x is None else x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dY):
        x, out, z_TR, A, B, m, n, bias = ctx.saved_tensors
        need_x, need_out, need_A, need_B, need_m = ctx.needs_input_grad[:5]
        site, s = ctx.site, ctx.site.scaling
        with no_autocast(dY.device):
            gain = None if m is None else gain_minus_one(m, n, site.frozen)
            dx = dA = dB = dm = dg = dbias = P_OR = None
            if A is not None and (need_B or ctx.need_dg):
                P_OR = (dY.T @ z_TR).to(B.dtype)
            if ctx.need_dg:
                dg = column_dot(dY, out, bias)
                dg = dg if P_OR is None else dg + s * (cast(B, dY.dtype) * P_OR).sum(1)
                dm = torch.where(site.frozen, 0.0, dg / n) if need_m else None
            if A is not None:
                dZ_TR = dY @ scaled_B(B, gain, s, dY.dtype) if need_x or need_A else None
                dA = (dZ_TR.T @ x.to(dY.dtype)).to(A.dtype) if need_A else None
                dB = s * P_OR if need_B else None
                dB = dB + gain[:, None] * dB if need_B and gain is not None else dB
                if need_x:
                    dx = (dZ_TR @ A.to(dY.dtype)).to(ctx.x_dtype)
                if site.full_gradient and m is not None and (need_A or need_B):
                    c_O = torch.where(site.frozen, 0.0, (1 + gain) * dg / n.square())
                    dA, dB = add_full_gradient(site, A, B, dY.dtype, c_O, dA, dB)
            dout = scale_rows(dY, gain, None) if need_out else None
            if ctx.needs_input_grad[5] and gain is not None:  # through `out` the bias gets g ⊙ dY, but it is never scaled
                dbias = -(gain * dY.sum(0, dtype=gain.dtype)).to(bias.dtype)
        return dx, dout, dA, dB, dm, dbias, None


class ScaleInput(Function):
    """x̃ = g ⊙ x (T, I) for the input axis."""

    @staticmethod
    def forward(ctx, x, A, B, m, site: Site, dtype: torch.dtype) -> Tensor:
        """m (I,); dtype: the one in which the layer will compute."""
        with no_autocast(x.device):
            n = site.norm(A, B, dtype, len(x)).clone()
            y = scale_rows(x, gain_minus_one(m, n, site.frozen), None)
        ctx.site, ctx.dtype = site, dtype
        ctx.save_for_backward(x, A, B, m, n)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dX):
        x, A, B, m, n = ctx.saved_tensors
        need_x, need_A, need_B, need_m = ctx.needs_input_grad[:4]
        site = ctx.site
        with no_autocast(dX.device):
            gain = gain_minus_one(m, n, site.frozen)
            dm = torch.where(site.frozen, 0.0, column_dot(dX, x, None) / n)
            dA = dB = None
            if site.full_gradient and A is not None and (need_A or need_B):
                A_c, B_c = cast(A, ctx.dtype), cast(B, ctx.dtype)
                q, redone = torch.where(site.frozen, 0.0, -(1 + gain) * dm / n), site.redone(A_c, B_c)
                dA, dB = norm.full_gradient_input(site.base, site.module, A_c, B_c, site.scaling, q, redone)
            dx = scale_rows(dX, gain, None) if need_x else None
        return dx, dA, dB, dm if need_m else None, None, None


def scale_rows(t_TO: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """t + (g − 1) ⊙ (t − bias) in t's dtype; a new tensor unless gain is None. `gain` = g − 1 in fp32."""
    if gain is None:
        return t_TO
    rest = t_TO if bias is None else t_TO - bias.to(t_TO.dtype)
    if gain.dtype == t_TO.dtype:
        return torch.addcmul(t_TO, rest, gain)
    if t_TO.is_cuda or bool((gain < SMALL_GAIN - 1).any()):  # CUDA converts inside the kernel; CPU would copy
        return torch.addcmul(t_TO, rest, gain, out=torch.empty_like(t_TO))
    return torch.addcmul(t_TO, rest, gain.to(t_TO.dtype))


def scaled_B(B: Tensor, gain: Tensor | None, s: float, dtype: torch.dtype) -> Tensor:
    """s·g ⊙ B (O, R) in `dtype`, from B rounded to `dtype` first: the B that the norm used."""
    B = cast(B, dtype)
    return (s * B if gain is None else (s * (1 + gain))[:, None] * B).to(dtype)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t rounded to `dtype`, kept in its own (fp32) precision."""
    return t if t.dtype == dtype else t.to(dtype).to(t.dtype)


def column_dot(a_TO: Tensor, b_TO: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_T a ⊙ (b − bias) (O,), products and sums in fp32 (fp64), in chunks of rows."""
    dtype = torch.float64 if a_TO.dtype == torch.float64 else torch.float32
    total = torch.zeros(a_TO.shape[1], dtype=dtype, device=a_TO.device)
    step = max(1, CHUNK_NUMBERS // max(1, a_TO.shape[1]))
    for a, b in zip(a_TO.split(step), b_TO.split(step), strict=True):
        b = b.to(dtype) if bias is None else b.to(dtype) - bias.to(dtype)
        total += (a * b).sum(0)
    return total


def add_full_gradient(site, A, B, dtype, c_O, dA, dB) -> tuple[Tensor | None, Tensor | None]:
    """Adds the norm's part to dA and dB, output axis."""
    A_c, B_c = A.to(dtype), B.to(dtype)
    extra_A, extra_B = norm.full_gradient_output(site.base, site.module, A_c, B_c, site.scaling, c_O, site.redone(A_c, B_c))
    return (None if dA is None else dA + extra_A), (None if dB is None else dB + extra_B)


def no_autocast(device: torch.device):
    """Explicit dtypes rule inside the op, whatever the caller's autocast says."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
