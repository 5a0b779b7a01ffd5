"""The adapted output from the base's output: forward and hand-written backward.

    output axis   y = out + (g − 1) ⊙ (out − bias) + (x·Aᵀ)·(s·g ⊙ B)ᵀ          out = the base's own output
                  P = dYᵀ·(x·Aᵀ);  dm = Σ_T dY ⊙ (y − bias) / m;  dB = s·g ⊙ P
                  dZ = dY·(s·g ⊙ B);  dA = dZᵀ·x;  dx = dZ·A;  dout = g ⊙ dY
    LoRA          the same with g = 1 and no m; magnitude only: the same without A and B
    input axis    x̃ = x + (g − 1) ⊙ x in front of the base and of a plain low-rank update; dm = Σ_T dx̃ ⊙ x / n
    dropout       x ⊙ mask and s/keep in place of x and s in the low-rank branch (not in the norm)
    other kinds   x = None with A and B given: `out` is x·Wᵀ + s·ΔV(x) already (convolutions, embeddings); they enter the norm only

(Eq. 5, 7, 11; Eq. 6 through `norm.full_gradient_*`.) The scale goes into B's rows, which are tiny, so the low-rank output
is never written and read back: two passes over the output. It enters as g − 1, formed in fp32, because bf16 resolves g near
1 to only 0.4 %; with B = 0 and the initial m, y equals the base's output bit for bit.

The magnitude's gradient is read off y, because a later operation (attention, a product) often keeps y anyway. Where that does
not serve, the base's output is made again from x: rows with |g| < 1e-2, and all rows once y was changed in place.

Cost over the base: 2·T·R·(I + O) FLOPs forward, twice that backward; kept for backward: x, y (only if m is trained; the
base's output instead where x need not be kept), R·(T + O) and O numbers. `autograd.py` calls these functions in eager mode,
`op.py` under torch.compile.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import kernels, norm
from .decomposition import gain_minus_one


class Site(Protocol):
    """The layer as the op sees it: scaling, its base, and its cached norm."""

    scaling: float
    full_gradient: bool
    axis: str
    frozen: Tensor | None  # rows (columns) without direction, bool; None if there are none

    def norm(self, A: Tensor | None, B: Tensor | None, dtype: torch.dtype, tokens: int) -> Tensor: ...
    def factors(self, A: Tensor | None, B: Tensor | None, m: Tensor | None, dtype, tokens: int, low: bool) -> Factors: ...
    def redone(self, A: Tensor, B: Tensor) -> Tensor: ...
    def small_rows(self, g: Tensor, given: Inputs) -> Tensor | tuple: ...


class Inputs(NamedTuple):
    """What the op takes. x (T, I), out (T, O), A (R, I), B (O, R), m (O,) fp32, bias (O,), mask (T, I) bool of kept inputs.

    x None with A given: the low-rank part is in `out` already; out's columns are then the norm's rows, whatever its axis.
    Without x, `out` may be (N, O, S)."""

    x: Tensor | None
    out: Tensor
    A: Tensor | None
    B: Tensor | None
    m: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    keep: float


class Factors(NamedTuple):
    """What an inference call needs of A, B and m, ready to use: g − 1 in fp32 and, unless some g is small, in the compute dtype;
    A and s·g ⊙ B in the compute dtype."""

    gain: Tensor | None
    gain_low: Tensor | None
    A: Tensor | None
    sB: Tensor | None


class Made(NamedTuple):
    """What the forward makes: y (T, O), and z (T, R), s·g ⊙ B (O, R) and n (O,) for the backward; None where there are none."""

    y: Tensor
    z: Tensor | None
    sB: Tensor | None
    n: Tensor | None


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    out: bool
    A: bool
    B: bool
    m: bool
    bias: bool

    def gain(self, site: Site, magnitude: bool) -> bool:
        """Is dg needed: for m, or for the norm's own gradient?"""
        return self.m or (site.full_gradient and magnitude and (self.A or self.B))


def forward(site: Site, given: Inputs, fresh: bool = False) -> Made:
    """y and what the backward needs; no autograd, any autocast. fresh: `out` is the caller's own and may be overwritten."""
    x, out, A, B, m, bias, mask, keep = given
    with no_autocast(out.device):
        n = gain = z = sB = None
        if m is not None:
            n = site.norm(A, B, out.dtype, kernels.torch_kernels.tokens(out)).clone()
            gain = gain_minus_one(m, n, site.frozen)
        if x is not None:
            z = dropped(x.to(out.dtype), mask) @ A.to(out.dtype).T
            sB = scaled_B(B, gain, site.scaling / keep, out.dtype)
        return Made(kernels.compose(out, gain, bias, z, sB, fresh), z, sB, n)


def infer(site: Site, x: Tensor | None, out: Tensor, A, B, m, bias, fresh: bool = False) -> Tensor:
    """y without anything kept, from factors that are made once per change of A, B and m; fresh: `out` may be overwritten."""
    with no_autocast(out.device):
        f = site.factors(A, B, m, out.dtype, kernels.torch_kernels.tokens(out), x is not None)
        if x is None:
            return kernels.compose(out, f.gain, bias, None, None)
        few = f.gain_low is not None and len(out) < kernels.torch_kernels.FEW_ROWS and out.device.type == "cpu"
        z = None if f.A is None else x.to(out.dtype) @ f.A.T
        return kernels.compose(out, f.gain_low if few else f.gain, bias, z, f.sB, fresh)


def make_factors(site: Site, A, B, m, dtype: torch.dtype, tokens: int, low: bool = True) -> Factors:
    """low: the low-rank product is made from them, too."""
    gain = None if m is None else gain_minus_one(m, site.norm(A, B, dtype, tokens), site.frozen)
    wide = gain is None or bool((gain < kernels.torch_kernels.SMALL_GAIN - 1).any())
    A_low = A.to(dtype, copy=True) if low and A is not None else None
    sB = None if A_low is None else scaled_B(B, gain, site.scaling, dtype)
    return Factors(gain, None if wide else gain.to(dtype), A_low, sB)


def backward(site: Site, needs: Needs, dY: Tensor, given: Inputs, made: Made, read_y: bool) -> tuple[Tensor | None, ...]:
    """(dx, dout, dA, dB, dm, dbias). `given` and `made` hold what was kept; read_y: made.y is y as the forward left it,
    else given.out is the base's output, or None: made again from x."""
    A, B, m, bias, n, s = given.A, given.B, given.m, given.bias, made.n, site.scaling / given.keep
    with no_autocast(dY.device):
        gain = None if m is None else gain_minus_one(m, n, site.frozen)
        dx = dA = dB = dm = dg = dbias = P = None
        if made.z is not None and (needs.B or (needs.gain(site, m is not None))):
            P = dY.T @ made.z
        dout = dY
        if needs.gain(site, m is not None):
            dout, dg = gain_gradient(site, dY, given, made, P, gain, read_y)
            dm = masked(dg / n, site.frozen) if needs.m else None
        elif gain is not None and needs.out:
            dout = kernels.torch_kernels.scale_rows(dY, gain, None)
        if made.z is not None:
            dZ = dY @ made.sB if needs.x or needs.A else None
            dA = (dZ.T @ dropped(given.x.to(dY.dtype), given.mask)).to(A.dtype) if needs.A else None
            dx = dropped(dZ @ A.to(dY.dtype), given.mask) if needs.x else None
            if needs.B:
                dB = P.to(B.dtype) * s if gain is None else ((1 + gain) * s)[:, None] * P
        if site.full_gradient and m is not None and A is not None and (needs.A or needs.B):
            dA, dB = add_full_gradient(site, A, B, dY.dtype, gain, dg, n, needs, dA, dB)
        if needs.bias and gain is not None:  # through `out` the bias gets g ⊙ dY, but it is never scaled
            dbias = -(gain * dY.sum((0, 2)[: dY.dim() - 1], dtype=gain.dtype)).to(bias.dtype)
    return dx, dout if needs.out else None, dA, dB, dm, dbias


def gain_gradient(site, dY, given: Inputs, made: Made, P, gain, read_y: bool) -> tuple[Tensor, Tensor]:
    """(g ⊙ dY, dg = Σ_T dY ⊙ (x·Wᵀ + s·z·Bᵀ)), from y where that is exact, else from the base's output."""
    if read_y:
        dout, dot = kernels.compose_backward(dY, made.y, gain, given.bias)
        g = 1 + gain
        small = site.small_rows(g, given)
        dg = dot / torch.where(g == 0, 1.0, g) if len(small) else dot / g
        if len(small):
            dY_small = dY.index_select(1, small)
            dot = kernels.torch_kernels.column_dot(dY_small, base_rows(site, given.x, small), None)
            dg[small] = dot + along_P(site, given, P, dY.dtype)[small]
        return dout, dg
    out, bias = (site.base.forward_rows(site.module, given.x), None) if given.out is None else (given.out, given.bias)
    dout, dg = kernels.compose_backward(dY, out.to(dY.dtype), gain, bias)
    return dout, dg if P is None else dg + along_P(site, given, P, dY.dtype)


def along_P(site, given: Inputs, P, dtype) -> Tensor:
    """s·rowsum(B ⊙ P): the low-rank half of dg."""
    return site.scaling / given.keep * (cast(given.B, dtype) * P).sum(1)


def base_rows(site, x: Tensor, index: Tensor) -> Tensor:
    """Columns `index` of x·Wᵀ (T, K), from fp32 row tiles."""
    return torch.cat([x.to(tile.dtype) @ tile.T for _, tile in site.base.row_tiles(site.module, index)], 1)


def scale_input(site: Site, x, A, B, m, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x̃ (T, I), n (I,))."""
    with no_autocast(x.device):
        n = site.norm(A, B, dtype, len(x)).clone()
        return kernels.torch_kernels.scale_rows(x, gain_minus_one(m, n, site.frozen), None), n


def scale_input_backward(site: Site, needs, dX, x, A, B, m, n, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """(dx, dA, dB, dm)."""
    need_x, need_A, need_B, need_m = needs
    with no_autocast(dX.device):
        gain = gain_minus_one(m, n, site.frozen)
        dx, dot = kernels.compose_backward(dX, x, gain, None)
        dm = masked(dot / n, site.frozen)
        dA = dB = None
        if site.full_gradient and A is not None and (need_A or need_B):
            dA, dB = norm_gradient(site, A, B, dtype, gain, dot, n)
    return dx if need_x else None, dA, dB, dm if need_m else None


def dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def masked(t: Tensor, frozen: Tensor | None) -> Tensor:
    """t, 0 on rows without direction."""
    return t if frozen is None else torch.where(frozen, 0.0, t)


def scaled_B(B: Tensor, gain: Tensor | None, s: float, dtype: torch.dtype) -> Tensor:
    """s·g ⊙ B (O, R) in `dtype`, from B rounded to `dtype` first: the B that the norm used."""
    low = B.to(dtype)
    return low * s if gain is None else ((s * (1 + gain))[:, None] * low).to(dtype)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t rounded to `dtype`, kept in its own (fp32) precision."""
    return t if t.dtype == dtype else t.to(dtype).to(t.dtype)


def add_full_gradient(site, A, B, dtype, gain, dg, n, needs: Needs, dA, dB) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB with the norm's part added."""
    more_A, more_B = norm_gradient(site, A, B, dtype, gain, dg, n)
    dA = more_A if dA is None else dA + more_A
    dB = more_B if dB is None else dB + more_B
    return dA if needs.A else None, dB if needs.B else None


def norm_gradient(site, A, B, dtype, gain, dg, n) -> tuple[Tensor, Tensor]:
    """(dA, dB) through the norm (Eq. 6), from dg and A and B rounded to the dtype of the forward."""
    if site.axis == "input":
        A_c, B_c, q_I = cast(A, dtype), cast(B, dtype), masked(-(1 + gain) * dg / n.square(), site.frozen)
        return norm.full_gradient_input(site.base, site.module, A_c, B_c, site.scaling, q_I, site.redone(A_c, B_c))
    A_c, B_c, c_O = A.to(dtype), B.to(dtype), masked((1 + gain) * dg / n.square(), site.frozen)
    return norm.full_gradient_output(site.base, site.module, A_c, B_c, site.scaling, c_O, site.redone(A_c, B_c))


def no_autocast(device: torch.device):
    """Explicit dtypes rule inside the op, whatever the caller's autocast says."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
