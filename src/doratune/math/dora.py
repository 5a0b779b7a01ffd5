"""DoRA as the paper writes it, and as it is computed: forward and backward on plain tensors.

    W' = m ⊙ V/|V|,   V = W + s·B·A                                                                    (Eq. 5)

`dora` is that line. A layer does not form V; with g = m/|V| and the base's own output `out` = x·Wᵀ + bias

    forward    y = g ⊙ (out − bias) + bias + (x·Aᵀ)·(s·g ⊙ B)ᵀ            scale, and a product that adds into it
    backward   P = dYᵀ·(x·Aᵀ);  dm = Σ_T dY ⊙ (y − bias) / m;  dB = s·g ⊙ P                            (Eq. 7, 11)
               dZ = dY·(s·g ⊙ B);  dA = dZᵀ·x;  dx = dZ·A + (g ⊙ dY)·W
    LoRA       the same with g = 1 and no m; magnitude only: the same without A and B
    input axis    x̃ = g ⊙ x in front of the base and of a plain low-rank update; dm = Σ_T dx̃ ⊙ x / n
    dropout    x ⊙ mask / keep in place of x in the low-rank branch (the norm knows no dropout)

What does not depend on x is in `Factors`, prepared once per change of the parameters (`layers/prepared.py`). The scale goes into
B's rows, which are tiny, so the low-rank output is never written and read back. g is fp32 (fp64) and meets a low precision inside
one kernel only: bf16 resolves g near 1 to 0.4 %. With B = 0 and the initial m, y is the base's output bit for bit.

The magnitude's gradient is read off y, which a later operation (attention, a product) often keeps anyway; `Factors.care` has the
rows where y has lost it: they are taken from W again.

Cost over the base: 2·T·R·(I + O) FLOPs forward, twice that backward, and one pass over an output each way.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

FEW_TOKENS = 8
MANY_TOKENS = 4096
CHUNK_NUMBERS = 2**18


def dora(W_OI: Tensor, A_RI: Tensor | None, B_OR: Tensor | None, m: Tensor | None, s: float, axis="output", n=None) -> Tensor:
    """W' (O, I) of Eq. 5 for a weight or rows of it; A and B None: magnitude only; m None: LoRA, V itself (Eq. 1).

    m (O,) on the output axis, (I,) on the input axis; n: |V| where it is known, in m's shape."""
    V_OI = W_OI if A_RI is None else torch.addmm(W_OI, B_OR, A_RI, alpha=s)
    if m is None:
        return V_OI
    across = 1 if axis == "output" else 0
    n = torch.linalg.vector_norm(V_OI, dim=across) if n is None else n
    return V_OI * (m / n).unsqueeze(across)


class Factors:
    """What calls of one weight need of A, B, m and the bias, ready to use, in one compute dtype ("low"); None where there is none.

    A_RI, A_IR           A and Aᵀ, low                           B_OR, B_RO     s·g ⊙ B and its transpose, low
    g, n                 m/n and |W + s·B·A| (O,), wide          g_minus_1      low, where no row needs more
    per_m, per_n         1/m and 1/n, 0 on rows without direction
    sg                   s·g (O, 1), or the number s: what turns P into dB
    bias, shift          wide, and (1 − g) ⊙ bias                drowned        could the bias take an output's digits?
    care                 rows whose dm y cannot give             size           how far the bias stands above outputs, once seen
    gain                 on the input axis: the factors of the scaled input, which has g and n
    generation, low, stamps, storage, held      what they were prepared from
    call                 the last `autograd.Call` with them
    """

    A_IR = A_RI = B_RO = B_OR = g = g_minus_1 = n = per_m = per_n = shift = bias = sg = s = wide = None
    zero = one = nothing = care = gain = size = call = passes = None
    generation = low = stamps = storage = held = None
    drowned = False

    def __init__(self, **values):
        self.__dict__.update(values)

    @classmethod
    def of(cls, A_RI: Tensor | None = None, B_OR: Tensor | None = None, **values) -> Factors:
        """With the views and constants that calls need besides."""
        f = cls(A_RI=A_RI, B_OR=B_OR, **values)
        if f.g is not None:
            f.zero, f.one = (constant(len(f.g), value, f.g.dtype, f.g.device) for value in (0.0, 1.0))
        if A_RI is not None:
            f.A_IR, f.B_RO, f.nothing = A_RI.T, B_OR.T, constant(0, 0.0, A_RI.dtype, A_RI.device)
        return f

    def copy(self) -> Factors:
        return Factors(**self.__dict__)

    def rows(self, which: slice) -> Factors:
        """The factors of some output rows of a packed weight."""
        part = self.copy()
        part.size = part.call = None
        for name in ("g", "per_m", "per_n", "g_minus_1", "shift", "bias", "n", "zero", "one"):
            if (value := getattr(self, name)) is not None:
                setattr(part, name, value[which])
        if self.B_RO is not None:
            part.B_RO, part.B_OR = self.B_RO[:, which], self.B_OR[which]
        part.sg = self.sg[which] if isinstance(self.sg, Tensor) else self.sg
        if self.care is not None:
            part.care = self.care[(self.care >= which.start) & (self.care < which.stop)] - which.start
            part.care = part.care if len(part.care) else None
        return part

    def with_bias(self, bias_O: Tensor) -> Factors:
        """The factors for a bias that is known to the call only."""
        part = self.copy()
        part.call = None
        part.take_bias(bias_O)
        return part

    def take_bias(self, bias_O: Tensor) -> None:
        self.bias = bias_O.detach().to(self.wide)
        self.shift = (1 - self.g) * self.bias
        self.drowned = self.A_IR is None or self.A_IR.dtype != self.wide


class Kept(NamedTuple):
    """What the backward has of a call: x (T, I), z = x·Aᵀ (T, R), and y (T, O) if `from_y`, else the base's output (T, O).

    mask: which inputs of the low-rank branch were kept by dropout, keep: the share that is. care: rows to be taken from W."""

    x: Tensor | None
    z: Tensor | None
    out: Tensor | None
    from_y: bool
    mask: Tensor | None = None
    keep: float = 1.0
    care: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are asked for; m also where the norm's own gradient needs dm."""

    x: bool
    out: bool
    A: bool
    B: bool
    m: bool


def forward(f: Factors, x_TI: Tensor | None, out: Tensor, mask: Tensor | None = None, keep: float = 1.0, fresh: bool = False):
    """(y (T, O), z = x·Aᵀ (T, R) or None); x None: no low-rank part here, `out` may then be (N, O, S).

    fresh: `out` is the caller's own and may be overwritten. No autograd, no autocast."""
    if x_TI is None or f.A_IR is None:
        return (out if f.g is None else scale(f, out, fresh)), None
    x_TI = x_TI if x_TI.dtype == out.dtype else x_TI.to(out.dtype)
    z_TR = torch.mm(x_TI if mask is None else dropped(x_TI, mask, keep), f.A_IR)
    if f.g is None:
        return (out.addmm_ if fresh else out.addmm)(z_TR, f.B_RO), z_TR
    if f.passes is not None:
        return f.passes.compose(out, f.g, f.shift, z_TR, f.B_OR), z_TR
    return scale(f, out, fresh).addmm_(z_TR, f.B_RO), z_TR


def backward(f: Factors, needs: Needs, dY_TO: Tensor, kept: Kept, W, low_B) -> tuple[Tensor | None, ...]:
    """(dx, dout, dA, dB, dm), None where not needed; dA and dB in the wide dtype.

    W: `W.output_columns(x, rows)` is x·W[rows]ᵀ in the wide dtype, for rows in `kept.care`; low_B: () -> B (O, R) as the norm
    used it. No autograd, no autocast."""
    x_TI, z_TR, out_TO, from_y, mask, keep, care = kept
    need_x, need_out, need_A, need_B, need_m = needs
    dx = dout = dA = dB = dm = P_OR = None
    if z_TR is not None and (need_B or (need_m and not (from_y and care is None))):
        P_OR = torch.mm(dY_TO.T, z_TR)
    if need_m:
        dout, dm = scale_backward(f, dY_TO, out_TO)
        if not from_y and P_OR is not None:
            dm = dm + along_P(f, low_B(), P_OR)
        dm = dm * (f.per_m if from_y else f.per_n)
        if care is not None:
            exact = column_dot(dY_TO.index_select(1, care), W.output_columns(x_TI, care), None)
            exact = exact if P_OR is None else exact + along_P(f, low_B(), P_OR)[care]
            dm[care] = exact * f.per_n[care]
    elif need_out:
        dout = dY_TO if f.g is None else scale(_without_bias(f), dY_TO)
    if z_TR is None:
        return dx, dout, dA, dB, dm
    if need_x or need_A:
        dZ_TR = torch.mm(dY_TO, f.B_OR)
    if need_A:
        x_TI = x_TI if x_TI.dtype == dY_TO.dtype else x_TI.to(dY_TO.dtype)
        dA = torch.mm(dZ_TR.T, x_TI if mask is None else dropped(x_TI, mask, keep)).to(f.wide)
    if need_x:
        dx = torch.mm(dZ_TR, f.A_RI)
        dx = dx if mask is None else dropped(dx, mask, keep)
    if need_B:
        dB = (P_OR if P_OR.dtype == f.wide else P_OR.to(f.wide)).mul_(f.sg)
    return dx, dout, dA, dB, dm


def along_P(f: Factors, B_OR: Tensor, P_OR: Tensor) -> Tensor:
    """s·rowsum(B ⊙ P) (O,): the low-rank half of Σ_T dY ⊙ (y − bias)/g."""
    return (B_OR.to(f.wide) * P_OR).sum(1).mul_(f.s)


def scale(f: Factors, out: Tensor, fresh: bool = False) -> Tensor:
    """g ⊙ (out − bias) + bias in out's dtype, exactly `out` where g = 1: one operation. out (T, O) or (N, O, S).

    On CPU a low precision goes through the batch-norm kernel in evaluation form, which is this with g in fp32 and one rounding."""
    flat = out.dim() == 2
    if f.g_minus_1 is not None and f.shift is None and flat and out.is_cpu and len(out) < FEW_TOKENS:
        return out.addcmul_(out, f.g_minus_1) if fresh else torch.addcmul(out, out, f.g_minus_1)
    if out.is_cpu and f.g.dtype != out.dtype:
        return _batch_norm(f, out, fresh and out.is_contiguous())
    g, shift = (f.g, f.shift) if flat else (f.g[:, None], None if f.shift is None else f.shift[:, None])
    if g.dtype == out.dtype and shift is None:
        return out.mul_(g) if fresh else out * g
    shift = f.zero[:1] if shift is None else shift
    return torch.addcmul(shift, out, g, out=out if fresh else torch.empty_like(out))


def scale_backward(f: Factors, dY: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(g ⊙ dY in dY's dtype, Σ_T dY ⊙ (kept − bias) (O,) in the wide dtype)."""
    if f.passes is not None and dY.dim() == 2:
        return f.passes.compose_backward(dY, kept, f.g, f.bias)
    dtype = dY.dtype
    # in fp32 the kernel's sums run down the rows one by one
    if not dY.is_cpu or dtype != kept.dtype or (dtype == f.wide and not FEW_TOKENS <= len(dY) <= MANY_TOKENS):
        return scale(_without_bias(f), dY), column_dot(dY, kept, f.bias)
    mean = f.zero if f.bias is None else f.bias
    scaled, dot_O, _ = _norm_backward(channels(dY), channels(kept), f.g, mean, f.one, None, None, False, 0.0, _BOTH)
    return rows(scaled), dot_O


_norm_backward, _BOTH = torch.ops.aten.native_batch_norm_backward.default, (True, True, False)


def _batch_norm(f: Factors, out: Tensor, fresh: bool) -> Tensor:
    """Output rows are channels, mean 0, variance 1, weight g, bias `shift`: 1024 × 1536 in bf16 take 0.16 ms on two cores."""
    shift = f.zero if f.shift is None else f.shift
    if not fresh:
        return rows(torch.native_batch_norm(channels(out), f.g, shift, f.zero, f.one, False, 0.0, 0.0)[0]).data  # no view
    view, none = channels(out), f.zero[:0]
    torch.ops.aten.native_batch_norm.out(
        view, f.g, shift, f.zero, f.one, False, 0.0, 0.0, out=view, save_mean=none, save_invstd=none
    )
    return out


def _without_bias(f: Factors) -> Factors:
    """The same gain without a bias to leave alone: gradients have none."""
    return f if f.shift is None else Factors(g=f.g, g_minus_1=f.g_minus_1, wide=f.wide, zero=f.zero, one=f.one)


def column_dot(a_TO: Tensor, b_TO: Tensor, bias_O: Tensor | None) -> Tensor:
    """Σ_T a ⊙ (b − bias) (O,), products and sums in fp32 (fp64), in chunks of rows; also of (N, O, S)."""
    wide = torch.float64 if a_TO.dtype == torch.float64 else torch.float32
    if a_TO.dim() == 3:
        a_TO, b_TO = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (a_TO, b_TO))
    step, total = max(1, CHUNK_NUMBERS // max(1, a_TO.shape[1])), None
    for a, b in zip(a_TO.split(step), b_TO.split(step), strict=True):
        b = b.to(wide) if bias_O is None else b.to(wide) - bias_O
        total = (a * b).sum(0) if total is None else total.add_((a * b).sum(0))
    return total


def dropped(x: Tensor, mask: Tensor, keep: float) -> Tensor:
    """x ⊙ mask / keep, in one operation."""
    return torch.ops.aten.native_dropout_backward.default(x, mask, 1.0 / keep)


def channels(t_TO: Tensor) -> Tensor:
    """(1, O, T, 1) in channels-last order over the same memory: rows of t are positions, columns channels; (N, O, S) as it is."""
    if t_TO.dim() == 3:
        return t_TO.contiguous()
    T, O = t_TO.shape
    return (t_TO if t_TO.is_contiguous() else t_TO.contiguous()).as_strided((1, O, T, 1), (T * O, 1, O, O))


def rows(t_1OT1: Tensor) -> Tensor:
    """`channels` undone."""
    if t_1OT1.dim() == 3:
        return t_1OT1
    _, O, T, _ = t_1OT1.shape
    return t_1OT1.as_strided((T, O), (O, 1))


@lru_cache(maxsize=64)
def constant(length: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector that is only ever read."""
    with torch.inference_mode(False):
        return torch.full((length,), value, dtype=dtype, device=device)
