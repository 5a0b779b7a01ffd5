"""The functions of `compose.py` as autograd functions, for eager mode: what is saved, and what a later operation may do to y.

y itself is saved (its memory is often kept by a later operation anyway), but as an alias with a version counter of its own:
a change in place is no error here, it is noticed by `VersionProbe`, and the base's output is then made again from x.
Libraries whose kernels write over a layer's output without telling autograd (`WRITERS`) switch that off: the base's output is
kept then. There is no second derivative, no batched and no forward-mode gradient: each raises one line.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor
from torch.autograd import Function

from .compose import Inputs, Made, Needs, Site, backward, forward, scale_input, scale_input_backward

WRITERS = ("liger_kernel", "unsloth")
"""Packages whose rotary embedding rotates q and k in the memory of the projection's output, unseen by version counters."""

_WRAPPED = (torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor)


def first_order(backward):
    """Run a backward without gradients; refuse what the hand-written formulas would get silently wrong."""

    @functools.wraps(backward)
    def checked(ctx, dY):
        if torch.is_grad_enabled():
            raise RuntimeError("adapted layers have no second derivative; call backward without create_graph=True")
        if any(wrapped(dY) for wrapped in _WRAPPED):
            raise RuntimeError("adapted layers take one output gradient at a time; do without is_grads_batched or vmap")
        return backward(ctx, dY)

    return checked


class Compose(Function):
    """`forward` and `backward` for eager autograd; A, B None: magnitude only; m None: LoRA; x None with A: see `Inputs`.

    Callers flatten and view outside: a view made in here could not be changed in place by a later op (`relu_`)."""

    @staticmethod
    def forward(ctx, x, out, A, B, m, bias, mask, keep: float, site: Site) -> Tensor:
        given = Inputs(x, out, A, B, m, bias, mask, keep)
        ctx.needs, ctx.x_dtype = Needs(*ctx.needs_input_grad[:6]), None if x is None else x.dtype
        return keep_for_backward(ctx, site, given, forward(site, given))

    @staticmethod
    @first_order
    def backward(ctx, dY):
        given, made, read_y, _ = kept(ctx)
        dx, *rest = backward(ctx.site, ctx.needs, dY, given, made, read_y)
        return None if dx is None else dx.to(ctx.x_dtype), *rest, None, None, None


class ComposeLinear(Function):
    """`Compose` with the base's product inside, for a plain linear layer: y from x and W.

    The base's input gradient is then added up within its product, instead of in a pass of its own over (T, I)."""

    @staticmethod
    def forward(ctx, x, W, A, B, m, bias, mask, keep: float, site: Site) -> Tensor:
        """W (O, I) frozen, in x's dtype; no autocast."""
        given = Inputs(x, torch.nn.functional.linear(x, W, bias), A, B, m, bias, mask, keep)
        need_x, _, *need = ctx.needs_input_grad[:6]
        ctx.needs = Needs(need_x, need_x, *need[:3], bias=False)
        ctx.need_bias = need[3]
        fresh = not keeps_out(ctx.needs, site, m, x) and not torch._C._len_torch_dispatch_stack()  # a mode may hold `out`
        return keep_for_backward(ctx, site, given, forward(site, given, fresh), W)

    @staticmethod
    @first_order
    def backward(ctx, dY):
        given, made, read_y, (W,) = kept(ctx)
        dx, dout, dA, dB, dm, _ = backward(ctx.site, ctx.needs, dY, given, made, read_y)
        if ctx.needs.x:
            dx = dout @ W if dx is None else dx.addmm_(dout, W)
        return dx, None, dA, dB, dm, dY.sum(0) if ctx.need_bias else None, None, None, None


def keeps_out(needs: Needs, site: Site, m: Tensor | None, x: Tensor | None) -> bool:
    """Is the base's output kept for m's gradient, instead of y? Where x is not kept, or where y may be written over unseen."""
    unsafe = x is None or not needs.A or any(name in sys.modules for name in WRITERS)
    return needs.gain(site, m is not None) and unsafe


def keep_for_backward(ctx, site: Site, given: Inputs, made: Made, *more: Tensor) -> Tensor:
    """Save what `backward` needs on the context; returns y."""
    x, out, A, B, m, bias, mask, ctx.keep = given
    needs, ctx.site = ctx.needs, site
    kept_out = out if keeps_out(needs, site, m, x) else None
    ctx.read_y = needs.gain(site, m is not None) and kept_out is None
    # `data`: the same memory with a version counter of its own, because a change in place is not an error here
    ctx.probe = VersionProbe(made.y) if ctx.read_y else None
    kept_y = made.y.data if ctx.read_y else None
    ctx.save_for_backward(x if needs.A else None, kept_out, A, B, m, bias, mask, kept_y, *made[1:], *more)
    return made.y


def kept(ctx) -> tuple[Inputs, Made, bool, list[Tensor]]:
    """The same again, whether y is as the forward left it, and what was saved besides. Saved tensors can be asked for only once."""
    x, out, A, B, m, bias, mask, y, z, sB, n, *more = ctx.saved_tensors
    read_y = ctx.read_y and not ctx.probe.changed()
    return Inputs(x, out, A, B, m, bias, mask, ctx.keep), Made(y, z, sB, n), read_y, more


class VersionProbe:
    """Sees whether a tensor was changed in place, without keeping its memory: a detached alias shares the version counter."""

    def __init__(self, t: Tensor):
        self.alias = t.detach()
        self.alias.data = t.new_empty(0)
        self.version = 0 if t.is_inference() else self.alias._version

    def changed(self) -> bool:
        return self.alias._version != self.version


class ScaleInput(Function):
    """x̃ = g ⊙ x (T, I) for the input axis."""

    @staticmethod
    def forward(ctx, x, A, B, m, site: Site, dtype: torch.dtype) -> Tensor:
        """m (I,); dtype: the one in which the layer will compute."""
        y, n = scale_input(site, x, A, B, m, dtype)
        ctx.site, ctx.dtype = site, dtype
        ctx.save_for_backward(x, A, B, m, n)
        return y

    @staticmethod
    @first_order
    def backward(ctx, dX):
        return *scale_input_backward(ctx.site, ctx.needs_input_grad[:4], dX, *ctx.saved_tensors, ctx.dtype), None, None


class BaseGradient(Function):
    """The base's output (…, O) with its input's gradient, for bases whose own kernel has none: dX = dY·W from row tiles."""

    @staticmethod
    def forward(ctx, x, out, site: Site) -> Tensor:
        ctx.site, ctx.x_dtype = site, x.dtype
        return out.clone()

    @staticmethod
    @first_order
    def backward(ctx, dY):
        dX = ctx.site.base.backward_rows(ctx.site.module, dY.reshape(-1, dY.shape[-1]))
        return dX.to(ctx.x_dtype).view(*dY.shape[:-1], dX.shape[-1]), dY, None
