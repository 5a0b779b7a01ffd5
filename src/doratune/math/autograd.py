"""The functions of `dora.py` as one autograd function, for eager mode: what is kept, and what a later operation may do to y.

y itself is kept (its memory is often kept by a later operation anyway), but as an alias with a version counter of its own: a
change in place is no error here, it is noticed (`mark`), and the base's output is then made again from x. A weight whose
outputs are overwritten by kernels that autograd does not see has `overwritten` set: the base's output is kept then. There is no
second derivative, no batched and no forward-mode gradient: each raises one line.

Kept for the backward: x, x·Aᵀ, and y if m is trained (the base's output instead where x need not be kept).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import norm
from .dora import Factors, Kept, Needs, backward, forward


class Call:
    """What a call is besides its tensors.

    weight: a `layers.weight.AdaptedWeight`; factors: its prepared ones; own: is the base's product made here? mask, keep: which
    inputs of the low-rank branch are kept, and their share; which: rows of a packed weight that the call is about; rescaled: the
    base's output holds the low-rank part already, or is the layer's input (on the input axis)."""

    __slots__ = ("factors", "keep", "known", "mask", "own", "rescaled", "weight", "which")

    def __init__(self, weight, factors: Factors, own=False, mask: Tensor | None = None, keep=1.0, which=None, rescaled=False):
        self.weight, self.own, self.mask, self.keep, self.which, self.rescaled = weight, own, mask, keep, which, rescaled
        self.factors = (factors.gain or factors) if rescaled else factors
        self.known: dict[tuple, Needs] = {}

    def wanted(self, needs_input_grad: tuple[bool, ...]) -> Needs:
        if needs_input_grad not in self.known:
            weight, rank = self.weight, len(self.weight.direction.tensors)
            need_x, need_out, _, _, *own = needs_input_grad
            A, B = own[:rank] if weight.direction.plain and rank else weight.direction.needs(tuple(own[:rank]))
            m = self.factors.g is not None and (any(own[rank:]) or (weight.full_gradient and (A or B)))
            x, out = (False, need_out) if self.rescaled else (need_x, need_x if self.own else need_out)
            self.known[needs_input_grad] = Needs(x, out, A, B, m)
        return self.known[needs_input_grad]


class Composed(Function):
    """y in the shape of the base's output, or (T, O). Callers view outside: a view made in here could not be changed in place by
    a later op (`relu_`)."""

    @staticmethod
    def forward(ctx, x, base, bias, call: Call, *tensors) -> Tensor:
        """x (…, I); base: W (O, I), frozen and in x's dtype, if `call.own`, else the base's output; tensors: the weight's own."""
        weight, f, needs = call.weight, call.factors, call.wanted(ctx.needs_input_grad)
        with no_autocast(base.device):
            out = torch.nn.functional.linear(x, base, bias) if call.own else base
            x_TI, out_TO = (None, out) if call.rescaled else (flat(x), flat(out))
            from_y = needs.m and needs.A and x_TI is not None and not weight.overwritten
            held = needs.m and not from_y
            # a mode may hold what a product returned, for a selective checkpoint
            fresh = call.own and not held and f.passes is None and not modes() and out.is_contiguous()
            y, z = forward(f, x_TI, out_TO, call.mask, call.keep, fresh)
        result = out if fresh else y
        result = result.data if result._is_view() else result
        drowning = needs.m and f.drowned and x is not None
        size = weight.registry.size_of(f, y if from_y else out_TO) if drowning else None
        plain = call.own and not held and f.care is None and size is None and weight.plain and call.which is None
        shapes = None if x is None else x.dtype, None if x is None else x.shape, base.shape, ctx.needs_input_grad[2]
        ctx.state = call, needs, from_y, plain, mark(result, f) if from_y else None, size, shapes
        W = base if call.own else weight.base.weight(weight.layer) if weight.base.writable else None
        # `data`: the same memory with a version counter of its own, because a change in place is not an error here
        kept = result.data if from_y else out_TO if held else None
        ctx.save_for_backward(x if needs.A or drowning else None, W, z, kept, *(() if plain else tensors))
        return result

    @staticmethod
    def backward(ctx, dY):
        if grad_enabled():
            raise RuntimeError("adapted layers have no second derivative; call backward without create_graph=True")
        if _is_wrapped(dY) or _is_batched(dY):
            raise RuntimeError("adapted layers take one output gradient at a time; do without is_grads_batched or vmap")
        call, needs, from_y, plain, probe, _, shapes = ctx.state
        x, W, z, y, *tensors = ctx.saved_tensors
        if not plain or (from_y and not unchanged(probe, y)) or any_autocast():
            return general_backward(ctx, dY, x, W, z, y, tensors or call.weight.tensors())
        if dY.dim() != 2:
            dY, y = flat(dY), None if y is None else flat(y)
        if x is not None and x.dim() != 2:
            x = flat(x)
        dx, dout, dA, dB, dm = backward(call.factors, needs, dY, Kept(x, z, y, from_y, call.mask, call.keep), None, None)
        if dx is not None:
            dx = dx.addmm_(dout, W)
            dx = dx if len(shapes[1]) == 2 else dx.view(shapes[1])
        dbias = dY.sum(0) if shapes[3] else None
        if call.weight.magnitude:
            return dx, None, dbias, None, dA, dB, dm
        return dx, None, dbias, None, dA, dB


def general_backward(ctx, dY: Tensor, x, W, z, out, tensors) -> tuple:
    """The gradients where something is out of the ordinary: rows that need care, y that was written to, a base's output that was
    given, directions that make their factors, a norm that is differentiated, rows of a packed weight."""
    call, needs, from_y, _, probe, size, (x_dtype, x_shape, out_shape, need_bias) = ctx.state
    weight, which, f, tensors = call.weight, call.which, call.factors, tuple(tensors)
    with no_autocast(dY.device), weight.standing_in(tensors, W):
        dY, x_TI, out = (t if t is None or call.rescaled else flat(t) for t in (dY, x, out))
        if from_y and not unchanged(probe, out):
            from_y, out = False, rest_of_base(weight, x_TI, which)
            f = without_bias(f)
        care = f.care if from_y else None
        care = care if size is None else weight.registry.care(size, care)

        def low_B() -> Tensor:
            B = weight.low_rank(tensors)[1].to(dY.dtype)
            return B if which is None else B[which]

        kept = Kept(x_TI, z, out, from_y, call.mask, call.keep, care)
        dx, dout, dA, dB, dm = backward(f, needs, dY, kept, PartOf(weight, which), low_B)
        if call.own and needs.x:
            dx = torch.mm(dout, W) if dx is None else dx.addmm_(dout, W)
        dx = None if dx is None else dx.to(x_dtype).view(x_shape)
        dbias = bias_gradient(call, dY) if need_bias else None
        c = f.g * weight.total(dm)[0] * f.per_n if weight.full_gradient and dm is not None and (needs.A or needs.B) else None
        if which is not None:
            dB, dm, c = (None if t is None else embedded(t, weight.shape[0], which) for t in (dB, dm, c))
        if c is not None:
            dA, dB = with_norm(weight, tensors, dY.dtype, c, dA, dB)
        grads = weight.pull_back(tensors, dA, dB, dm, ctx.needs_input_grad[4:])
    return dx, dout.view(out_shape) if ctx.needs_input_grad[1] and not call.own else None, dbias, None, *grads


class PartOf(NamedTuple):
    """Rows of a weight, as `dora.backward` asks for them."""

    weight: object
    which: slice | None

    def output_columns(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.weight.output_columns(x, rows if self.which is None else rows + self.which.start)


def rest_of_base(weight, x_TI: Tensor, which: slice | None) -> Tensor:
    """The base's output without bias (T, O), made again from x."""
    out = weight.forward_rows(x_TI)
    return out if which is None else out[:, which]


def without_bias(f: Factors) -> Factors:
    part = f.copy()
    part.bias = part.shift = None
    return part


def bias_gradient(call: Call, dY: Tensor) -> Tensor:
    """Through `out` the bias gets g ⊙ dY, but it is never scaled: the rest, or all of it where the product was made here."""
    f, across = call.factors, (0, 2)[: dY.dim() - 1]
    if call.own:
        return dY.sum(across)
    total = dY.sum(across, dtype=f.wide)
    return torch.zeros_like(total) if f.g is None else total * (1 - f.g)


def with_norm(weight, tensors, low: torch.dtype, c: Tensor, dA, dB) -> tuple[Tensor, Tensor]:
    """dA and dB with the part that goes through the norm (Eq. 6); c = g·dm/n, A and B rounded to the dtype of the forward."""
    A, B = weight.low_rank(tuple(tensors))
    if weight.axis == "input":
        A, B = (t.to(low).to(t.dtype) for t in (A, B))
        more = norm.full_gradient_input(weight, A, B, weight.scaling, -c, weight.redone(A, B))
    else:
        A, B = A.to(low), B.to(low)
        more = norm.full_gradient_output(weight, A, B, weight.scaling, c, weight.redone(A, B))
    return tuple(new if old is None else old + new for old, new in zip((dA, dB), more, strict=True))


def embedded(t: Tensor, rows: int, which: slice) -> Tensor:
    """A gradient of some rows as one of all of them."""
    whole = t.new_zeros(rows, *t.shape[1:])
    whole[which] = t
    return whole


def mark(y: Tensor, f: Factors) -> tuple:
    """What tells later whether y was written to, without keeping its memory: see `unchanged`.

    A detached alias shares the version counter. Writes that bump none (`.data`, numpy) are seen on a CPU by all bytes of a small
    y and by those at one or two places of a larger; elsewhere a look would make the host wait: there `overwritten` says that a
    model has such kernels."""
    alias = y.detach()
    alias.data = f.nothing
    size = y.nbytes
    seen = y.is_cpu and y.is_contiguous()
    first, length = (size // 3, BYTES) if size >= 3 * BYTES else (0, size)
    second = 2 * first if size >= LARGE_BYTES else None
    before = (_bytes(y, first, length), None if second is None else _bytes(y, second, length)) if seen else None
    return alias, 0 if y.is_inference() else alias._version, first, second, length, before


def unchanged(mark: tuple, y: Tensor) -> bool:
    """y: the memory as it is now."""
    alias, version, first, second, length, before = mark
    if alias._version != version:
        return False
    return before is None or (_bytes(y, first, length) == before[0] and (second is None or _bytes(y, second, length) == before[1]))


def _bytes(y: Tensor, offset: int, length: int) -> bytes:
    return _string_at(y.data_ptr() + offset, length)


BYTES, LARGE_BYTES = 128, 2**14
_string_at = ctypes.string_at


class BaseGradient(Function):
    """The base's output (…, O) with its input's gradient, for bases whose own kernel has none: dX = dY·W from row tiles."""

    @staticmethod
    def forward(ctx, x, out, weight) -> Tensor:
        ctx.weight, ctx.x_dtype = weight, x.dtype
        return out.clone()

    @staticmethod
    def backward(ctx, dY):
        dX = ctx.weight.backward_rows(dY.reshape(-1, dY.shape[-1]))
        return dX.to(ctx.x_dtype).view(*dY.shape[:-1], dX.shape[-1]), dY, None


modes = torch._C._len_torch_dispatch_stack
grad_enabled, any_autocast = torch.is_grad_enabled, torch._C._is_any_autocast_enabled
_is_wrapped, _is_batched = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor


def flat(x: Tensor) -> Tensor:
    """(T, I), also where a size is 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


CACHE_LINE = 64
"""Bytes."""


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides of x, and as far from a cache line's beginning."""
    once = [size if stride else 1 for size, stride in zip(x.shape, x.stride(), strict=True)]  # dimensions that were expanded
    reach = sum((size - 1) * stride for size, stride in zip(once, x.stride(), strict=True) if size) + 1
    flat_y = torch.empty(reach + CACHE_LINE // y.itemsize, dtype=y.dtype, device=y.device)
    offset = (x.data_ptr() - flat_y.data_ptr()) % CACHE_LINE // y.itemsize
    small = flat_y.as_strided(once, x.stride(), offset)
    return small.copy_(y[tuple(slice(0, size) for size in once)]).expand(x.shape)


def no_autocast(device: torch.device):
    """Explicit dtypes rule in here, whatever the caller's autocast says."""
    if any_autocast() and device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


_NOTHING = contextlib.nullcontext()
