"""The functions of `compose.py` as custom ops: torch.compile sees one node per layer and direction, so `fullgraph=True` works.

    doratune::compose          (x, out, A, B, m, …, handle) → y, z, s·g ⊙ B, n            and its backward
    doratune::scale_input      (x, A, B, m, …, handle) → x̃, n                              and its backward
    doratune::frozen_rows      (ids, handle) → w² and the rows without direction, of an embedding

The layer is reached through a handle, inside the op: the norm, its cache and the base's own products stay out of the
traced graph, whose guards would otherwise change with every step. Eager calls use `autograd.py`, which does the same for less
overhead. The ops are marked unsafe for CUDA graphs: a replay would not ask whether A or B changed.

The handle is a tensor of one integer, on the CPU: an input of the traced code and no constant, so that blocks compiled one by one
share their code.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from .compose import Inputs, Made, Needs, backward, forward, scale_input, scale_input_backward

_owners: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


class Handle:
    """A number by which an op finds its layer; copies of a layer get one of their own."""

    def __init__(self):
        with torch.inference_mode(False):
            self.tensor = torch.tensor(next(_numbers), device="cpu")

    def bind(self, owner) -> None:
        """`owner.op_site(gradients, count)` gives the op its `Site`."""
        _owners[self.tensor.item()] = owner

    def bound(self) -> bool:
        return self.tensor.item() in _owners

    def __deepcopy__(self, memo):
        return Handle()

    def __reduce__(self):
        return Handle, ()


def site(handle: Tensor, gradients: bool, count: bool = False):
    owner = _owners.get(handle.item())
    if owner is None:
        raise RuntimeError("the adapted layer of this compiled graph is gone; compile the model again")
    return owner.op_site(gradients, count)


@torch.library.custom_op("doratune::compose", mutates_args=(), tags=_TAGS)
def compose(
    x: Tensor | None, out: Tensor, A: Tensor | None, B: Tensor | None, m: Tensor, bias: Tensor | None, mask: Tensor | None,
    keep: float, handle: Tensor, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, z, s·g ⊙ B, n); z and s·g ⊙ B empty where there is no low-rank product to make. See `compose.forward`."""
    y, z, sB, n = forward(site(handle, gradients, count=True), Inputs(x, out, A, B, m, bias, mask, keep))
    return y, _or_empty(z, y), _or_empty(sB, y), n


@compose.register_fake
def _(x, out, A, B, m, bias, mask, keep, handle, gradients):
    rank = 0 if x is None else A.shape[0]
    y = out.new_empty(out.shape)
    return (
        y,
        out.new_empty(out.shape[0] if rank else 0, rank),
        out.new_empty(out.shape[1] if rank else 0, rank),
        torch.empty_like(m),
    )


@torch.library.custom_op("doratune::compose_backward", mutates_args=(), tags=_TAGS)
def compose_backward(
    dY: Tensor, x: Tensor | None, out: Tensor | None, A: Tensor | None, B: Tensor | None, m: Tensor, bias: Tensor | None,
    mask: Tensor | None, z: Tensor, sB: Tensor, n: Tensor, handle: Tensor, keep: float, needs: list[bool],
    x_dtype: torch.dtype, in_features: int,
) -> list[Tensor]:  # fmt: skip
    """The needed ones of (dx, dout, dA, dB, dm, dbias), in this order."""
    z, sB = (z, sB) if z.shape[1] else (None, None)
    made, given = Made(None, z, sB, n), Inputs(x, out, A, B, m, bias, mask, keep)
    dx, *rest = backward(site(handle, True), Needs(*needs), dY, given, made, read_y=False)
    grads = [None if dx is None else dx.to(x_dtype), *rest]
    return [g.contiguous() for g, needed in zip(grads, needs, strict=True) if needed]


@compose_backward.register_fake
def _(dY, x, out, A, B, m, bias, mask, z, sB, n, handle, keep, needs, x_dtype, in_features):
    shapes = [lambda: dY.new_empty(dY.shape[0], in_features, dtype=x_dtype), lambda: dY.new_empty(dY.shape)]
    shapes += [lambda t=t: t.new_empty(t.shape) for t in (A, B, m, bias)]
    return [make() for make, needed in zip(shapes, needs, strict=True) if needed]


def _setup(ctx, inputs, output):
    x, out, A, B, m, bias, mask, ctx.keep, handle, _ = inputs
    _, z, sB, n = output
    ctx.mark_non_differentiable(z, sB, n)
    ctx.set_materialize_grads(False)
    ctx.needs = [bool(need) for need in ctx.needs_input_grad[:6]]
    # the base's output is kept, not y: compiled code may change y in place, which autograd would refuse for a saved output
    keep_x, magnitude = ctx.needs[2], ctx.needs[4] or ctx.needs[2] or ctx.needs[3]
    ctx.x_dtype, ctx.in_features = (out.dtype, 0) if x is None else (x.dtype, x.shape[1])
    kept = (x if keep_x else None, out if magnitude else None, A, B, m, bias, mask, z, sB, n)
    ctx.save_for_backward(*kept, handle)


def _backward(ctx, dY, *_):
    grads = iter(compose_backward(dY, *ctx.saved_tensors, ctx.keep, ctx.needs, ctx.x_dtype, ctx.in_features))
    return (*(next(grads) if needed else None for needed in ctx.needs), None, None, None, None)


compose.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("doratune::scale_input", mutates_args=(), tags=_TAGS)
def scaled_input(
    x: Tensor, A: Tensor | None, B: Tensor | None, m: Tensor, dtype: torch.dtype, handle: Tensor, gradients: bool
) -> tuple[Tensor, Tensor]:
    """(x̃, n). See `compose.scale_input`."""
    y, n = scale_input(site(handle, gradients, count=True), x, A, B, m, dtype)
    return y.contiguous(), n


@scaled_input.register_fake
def _(x, A, B, m, dtype, handle, gradients):
    return x.new_empty(x.shape), m.new_empty(m.shape)


@torch.library.custom_op("doratune::scale_input_backward", mutates_args=(), tags=_TAGS)
def scaled_input_backward(
    dX: Tensor,
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    m: Tensor,
    n: Tensor,
    handle: Tensor,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """The needed ones of (dx, dA, dB, dm)."""
    layer = site(handle, True)
    dx, dA, dB, dm = scale_input_backward(layer, needs, dX, x, A, B, m, n, dtype)
    dA = torch.zeros_like(A) if needs[1] and dA is None else dA
    dB = torch.zeros_like(B) if needs[2] and dB is None else dB
    return [g.contiguous() for g, needed in zip((dx, dA, dB, dm), needs, strict=True) if needed]


@scaled_input_backward.register_fake
def _(dX, x, A, B, m, n, handle, dtype, needs):
    return [t.new_empty(t.shape) for t, needed in zip((dX, A, B, m), needs, strict=True) if needed]


def _setup_input(ctx, inputs, output):
    x, A, B, m, ctx.dtype, handle, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.needs = [bool(need) for need in ctx.needs_input_grad[:4]]
    ctx.save_for_backward(x, A, B, m, output[1], handle)


def _backward_input(ctx, dX, *_):
    grads = iter(scaled_input_backward(dX, *ctx.saved_tensors, ctx.dtype, ctx.needs))
    return (*(next(grads) if needed else None for needed in ctx.needs), None, None, None)


scaled_input.register_autograd(_backward_input, setup_context=_setup_input)


@torch.library.custom_op("doratune::frozen_rows", mutates_args=(), tags=_TAGS)
def frozen_rows(ids: Tensor, handle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w² in `dtype`, is the row without direction?) of the looked-up rows of an embedding, in the shape of ids."""
    w2, directionless, _ = site(handle, False, count=True).facts
    return w2[ids].to(dtype), directionless[ids]


@frozen_rows.register_fake
def _(ids, handle, dtype):
    return ids.new_empty(ids.shape, dtype=dtype), ids.new_empty(ids.shape, dtype=torch.bool)


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, 0) if t is None else t
