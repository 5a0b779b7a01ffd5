"""The functions of `dora.py` as one autograd function, for eager mode: what is kept, and what a later operation may do to y.

y itself is kept (its memory is often kept by a later operation anyway), but as an alias with a version counter of its own: a
change in place is no error here, it is noticed by `VersionProbe`, and the base's output is then made again from x. A weight whose
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


class Call(NamedTuple):
    """What a call is besides its tensors; `weight` is a `layers.weight.AdaptedWeight`."""

    weight: object
    factors: Factors
    own: bool = False
    """Is the base's product made here?"""
    mask: Tensor | None = None
    keep: float = 1.0
    which: slice | None = None
    """Rows of a packed weight that the call is about."""
    rescaled: bool = False
    """The base's output holds the low-rank part already, or is the layer's input (on the input axis)."""

    @property
    def gain(self) -> Factors:
        """The factors that scale this output."""
        return (self.factors.gain or self.factors) if self.rescaled else self.factors

    def wanted(self, needs_input_grad: tuple[bool, ...]) -> Needs:
        weight, rank = self.weight, len(self.weight.direction.names)
        need_x, need_out, _, _, *own = needs_input_grad
        A, B = weight.direction.needs(tuple(own[:rank]))
        m = self.gain.g is not None and (any(own[rank:]) or (weight.full_gradient and (A or B)))
        if self.rescaled:
            return Needs(False, need_out, A, B, m)
        return Needs(need_x, need_x if self.own else need_out, A, B, m)


class Composed(Function):
    """y in the shape of the base's output, or (T, O). Callers view outside: a view made in here could not be changed in place by
    a later op (`relu_`)."""

    @staticmethod
    def forward(ctx, x, base, bias, call: Call, *tensors) -> Tensor:
        """x (…, I); base: W (O, I), frozen and in x's dtype, if `call.own`, else the base's output; tensors: the weight's own."""
        weight, f, needs = call.weight, call.gain, call.wanted(ctx.needs_input_grad)
        with no_autocast(base.device):
            out = torch.nn.functional.linear(x, base, bias) if call.own else base
            x_TI, out_TO = (None, out) if call.rescaled else (flat(x), flat(out))
            from_y = needs.m and needs.A and x_TI is not None and not weight.overwritten
            held = needs.m and not from_y
            # a mode may hold what a product returned, for a selective checkpoint
            fresh = call.own and not held and f.passes is None and not torch._C._len_torch_dispatch_stack() and out.is_contiguous()
            y, z = forward(f, x_TI, out_TO, call.mask, call.keep, fresh)
        ctx.call, ctx.needs, ctx.from_y = call, needs, from_y
        ctx.x_is, ctx.out_shape = None if x is None else (x.dtype, x.shape), None if call.own else base.shape
        result = out if fresh else y
        result = result.data if result._is_view() else result
        ctx.probe = VersionProbe(result) if from_y else None
        own_W = base if call.own else weight.base.weight(weight.layer) if weight.base.writable else None
        drowning = needs.m and f.drowned and x is not None
        ctx.size = weight.registry.size_of(f, y if from_y else out_TO) if drowning else None
        plain = from_y and f.care is None and not drowning and weight.direction.plain
        later = not plain or weight.relative or weight.full_gradient
        ctx.save_for_backward(
            x if needs.A or drowning else None,
            own_W,
            z,
            # `data`: the same memory with a version counter of its own, because a change in place is not an error here
            y.data if from_y else out_TO if held else None,
            *(tensors if later else ()),
        )
        return result

    @staticmethod
    def backward(ctx, dY):
        if torch.is_grad_enabled():
            raise RuntimeError("adapted layers have no second derivative; call backward without create_graph=True")
        if any(wrapped(dY) for wrapped in _WRAPPED):
            raise RuntimeError("adapted layers take one output gradient at a time; do without is_grads_batched or vmap")
        x, W, z, out, *tensors = ctx.saved_tensors
        call, needs, f, from_y = ctx.call, ctx.needs, ctx.call.gain, ctx.from_y
        weight, which = call.weight, call.which
        with no_autocast(dY.device), weight.standing_in(tensors, W):
            dY = dY if call.rescaled else flat(dY)
            x_TI = x if x is None or call.rescaled else flat(x)
            if from_y and ctx.probe.changed(out):
                from_y, out = False, rest_of_base(weight, x_TI, f, which)
                f = without_bias(f)
            care = f.care if from_y else None
            if ctx.size is not None:
                care = weight.registry.care(ctx.size, care)
            kept = Kept(x_TI, z, out, from_y, call.mask, call.keep, care)

            def low_B() -> Tensor:
                B = weight.low_rank(tuple(tensors or weight.tensors()))[1].to(dY.dtype)
                return B if which is None else B[which]

            dx, dout, dA, dB, dm = backward(f, needs, dY, kept, PartOf(weight, which), low_B)
            if call.own and needs.x:
                dx = torch.mm(dout, W) if dx is None else dx.addmm_(dout, W)
            c = f.g * dm * f.per_n if weight.full_gradient and dm is not None and (needs.A or needs.B) else None
            if dx is not None:
                dtype, x_shape = ctx.x_is
                dx = (dx if dx.dtype == dtype else dx.to(dtype)).view(x_shape)
            dbias = bias_gradient(call, f, dY) if ctx.needs_input_grad[2] else None
            if which is not None:
                dB, dm, c = (None if t is None else embedded(t, weight.shape[0], which) for t in (dB, dm, c))
            if c is not None:
                dA, dB = with_norm(weight, tensors, dY.dtype, c, dA, dB)
            grads = weight.pull_back(tuple(tensors), dA, dB, dm, ctx.needs_input_grad[4:])
        return dx, dout.view(ctx.out_shape) if ctx.needs_input_grad[1] and not call.own else None, dbias, None, *grads


class PartOf(NamedTuple):
    """Rows of a weight, as `dora.backward` asks for them."""

    weight: object
    which: slice | None

    def output_columns(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.weight.output_columns(x, rows if self.which is None else rows + self.which.start)


def rest_of_base(weight, x_TI: Tensor, f: Factors, which: slice | None) -> Tensor:
    """The base's output without bias (T, O), made again from x."""
    out = weight.forward_rows(x_TI)
    return out if which is None else out[:, which]


def without_bias(f: Factors) -> Factors:
    part = f.copy()
    part.bias = part.shift = None
    return part


def bias_gradient(call: Call, f: Factors, dY: Tensor) -> Tensor:
    """Through `out` the bias gets g ⊙ dY, but it is never scaled: the rest, or all of it where the product was made here."""
    across = (0, 2)[: dY.dim() - 1]
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


class VersionProbe:
    """Sees whether a tensor was written to, without keeping its memory.

    A detached alias shares the version counter. Writes that bump none (`.data`, numpy) are seen on a CPU by a few bytes from all over
    the tensor; elsewhere a look would make the host wait: there `overwritten` says that a model has kernels that write so."""

    __slots__ = ("alias", "bytes", "version")

    def __init__(self, t: Tensor):
        self.alias = t.detach()
        self.alias.data = t.new_empty(0)
        self.version = 0 if t.is_inference() else self.alias._version
        self.bytes = some_bytes(t)

    def changed(self, t: Tensor) -> bool:
        """t: the memory as it is now."""
        return self.alias._version != self.version or some_bytes(t) != self.bytes


PLACES, BYTES = 8, 16


def some_bytes(t: Tensor) -> list[bytes] | None:
    """Bytes from evenly spread places of a contiguous CPU tensor."""
    size = t.nbytes
    if t.device.type != "cpu" or size < PLACES * BYTES or not t.is_contiguous():
        return None
    start, step = t.data_ptr(), (size - BYTES) // (PLACES - 1)
    return [ctypes.string_at(start + place * step, BYTES) for place in range(PLACES)]


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


_WRAPPED = (torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor)


def flat(x: Tensor) -> Tensor:
    """(T, I), also where a size is 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def no_autocast(device: torch.device):
    """Explicit dtypes rule in here, whatever the caller's autocast says."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


_NOTHING = contextlib.nullcontext()
