"""The two passes over an output, in PyTorch.

    compose            y = out + h ⊙ (out − bias) + z·(s·g ⊙ B)ᵀ,   h = g − 1
    compose_backward   dout = dY + h ⊙ dY  and  Σ_T dY ⊙ (kept − bias)

On CPU the library's batch-norm kernels in evaluation form compute just this: channels are our output rows, mean = bias,
variance = 1, weight = g in fp32 over a low-precision input, each result rounded once; their backward forms both results in one
read. 1024 × 1536 in bf16, two cores: backward 0.24 ms against 0.53 ms for a scaled copy and a chunked fp32 sum.

Outputs of convolutions come as (N, O, S), channels in the middle, and go through the same kernels as they lie; a transposed
copy would cost two more passes, and later layers would see another layout.

Cost: one read and one write of the output each; the low-rank product adds into the result in place.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SMALL_GAIN = 0.25
"""Below this g, g − 1 in a low precision would be off by more than the result's own rounding."""

CHUNK_NUMBERS = 2**18
FEW_ROWS = 8
MANY_ROWS = 4096


def compose(
    out_TO: Tensor,
    gain_O: Tensor | None,
    bias_O: Tensor | None,
    z_TR: Tensor | None,
    sB_OR: Tensor | None,
    fresh: bool = False,
) -> Tensor:
    """y (T, O) in out's dtype; gain = g − 1 in fp32 (fp64), None for LoRA; z and sB None for magnitude only; fresh: `out` may be
    overwritten. Without z, out may be (N, O, S)."""
    if gain_O is None:
        return out_TO.addmm_(z_TR, sB_OR.T) if fresh else torch.addmm(out_TO, z_TR, sB_OR.T)
    y_TO = scale_rows(out_TO, gain_O, bias_O, fresh)
    return y_TO if z_TR is None else y_TO.addmm_(z_TR, sB_OR.T)


def compose_backward(dY_TO: Tensor, kept_TO: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
    """(g ⊙ dY in dY's dtype, Σ_T dY ⊙ (kept − bias) in fp32 (fp64))."""
    many = dY_TO.dim() == 2 and len(dY_TO) > MANY_ROWS and dY_TO.dtype.itemsize >= 4  # its sums run down the rows one by one
    if dY_TO.device.type != "cpu" or tokens(dY_TO) < FEW_ROWS or many or dY_TO.dtype != kept_TO.dtype:
        return scale_rows(dY_TO, gain_O, None), column_dot(dY_TO, kept_TO, bias_O)
    mean, one = (constant(len(gain_O), 0.0, gain_O.dtype) if bias_O is None else bias_O.to(gain_O)), ones_like(gain_O)
    scaled, dot_O, _ = torch.ops.aten.native_batch_norm_backward(
        channels(dY_TO), channels(kept_TO), 1 + gain_O, mean, one, None, None, False, 0.0, [True, True, False]
    )
    return rows(scaled), dot_O


def scale_rows(t_TO: Tensor, gain_O: Tensor, bias_O: Tensor | None, fresh: bool = False) -> Tensor:
    """t + (g − 1) ⊙ (t − bias) in t's dtype: a new tensor, or t itself overwritten if `fresh`. Exactly t where g = 1."""
    low = gain_O.dtype != t_TO.dtype
    if low and t_TO.device.type == "cpu" and tokens(t_TO) >= FEW_ROWS:
        zero, one = constant(len(gain_O), 0.0, gain_O.dtype), ones_like(gain_O)
        bias = zero if bias_O is None else bias_O.to(gain_O)
        if fresh and t_TO.is_contiguous():
            t, none = channels(t_TO), constant(0, 0.0, gain_O.dtype)
            norm_out = torch.ops.aten.native_batch_norm.out
            norm_out(t, 1 + gain_O, bias, bias, one, False, 0.0, 0.0, out=t, save_mean=none, save_invstd=none)
            return t_TO
        return rows(torch.batch_norm(channels(t_TO), 1 + gain_O, bias, bias, one, False, 0.0, 0.0, False))
    if t_TO.dim() == 3:
        gain_O, bias_O = gain_O[:, None], None if bias_O is None else bias_O[:, None]
    if bias_O is None and gain_O.dtype == t_TO.dtype and t_TO.dtype.itemsize >= 4:
        return t_TO.mul_(1 + gain_O) if fresh else t_TO * (1 + gain_O)
    rest = t_TO if bias_O is None else t_TO - bias_O.to(t_TO.dtype)
    if low and (t_TO.is_cuda or bool((gain_O < SMALL_GAIN - 1).any())):  # CUDA converts inside the kernel; CPU would copy
        return torch.addcmul(t_TO, rest, gain_O, out=torch.empty_like(t_TO))
    return torch.addcmul(t_TO, rest, gain_O.to(t_TO.dtype))


def column_dot(a_TO: Tensor, b_TO: Tensor, bias_O: Tensor | None) -> Tensor:
    """Σ_T a ⊙ (b − bias) (O,), products and sums in fp32 (fp64), in chunks of rows."""
    dtype = torch.float64 if a_TO.dtype == torch.float64 else torch.float32
    total = torch.zeros(a_TO.shape[1], dtype=dtype, device=a_TO.device)
    if a_TO.dim() == 3:
        a_TO, b_TO = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (a_TO, b_TO))
    step = max(1, CHUNK_NUMBERS // max(1, a_TO.shape[1]))
    for a, b in zip(a_TO.split(step), b_TO.split(step), strict=True):
        b = b.to(dtype) if bias_O is None else b.to(dtype) - bias_O.to(dtype)
        total += (a * b).sum(0)
    return total


def tokens(t: Tensor) -> int:
    """T of (T, O); N·S of (N, O, S)."""
    return len(t) if t.dim() == 2 else len(t) * t.shape[2]


def channels(t_TO: Tensor) -> Tensor:
    """(1, O, T, 1) in channels-last order over the same memory: rows of t are positions, columns channels; (N, O, S) as it is."""
    if t_TO.dim() == 3:
        return t_TO.contiguous()
    return t_TO.contiguous().T[None, :, :, None]


def rows(t_1OT1: Tensor) -> Tensor:
    """`channels` undone. Not a view to autograd: a later operation may change it in place."""
    if t_1OT1.dim() == 3:
        return t_1OT1
    return t_1OT1.view(t_1OT1.shape[1:3]).T.data


def ones_like(t_O: Tensor) -> Tensor:
    return constant(len(t_O), 1.0, t_O.dtype)


@lru_cache(maxsize=64)
def constant(length: int, value: float, dtype: torch.dtype) -> Tensor:
    """A vector that is only ever read."""
    with torch.inference_mode(False):
        return torch.full((length,), value, dtype=dtype)
