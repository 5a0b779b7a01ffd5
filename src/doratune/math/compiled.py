"""The functions of `dora.py` as custom ops: torch.compile sees one node per layer and direction, so `fullgraph=True` works.

    doratune::compose          (x, out, bias, mask, tensors, W, …, handle) → y, z            and its backward
    doratune::frozen_rows      (ids, …, handle) → w² and the rows without direction, of an embedding

`tensors` are the weight's own parameters, W its frozen weight, where that is one plain tensor, and s the factor of B·A: what a call
is given is what it computes with, whatever stands in the layer itself (`functional_call`). The adapted weight is reached through a
handle, inside the op: factors, their preparation and the base's own products stay out of the traced graph, whose guards would
otherwise change with every step. Eager calls use `autograd.py`, which does the same for less overhead. The ops are marked unsafe
for CUDA graphs: a replay would not ask whether A or B changed.

The handle is a tensor of one random integer, on the CPU: an input of the traced code and no constant, so that blocks compiled one
by one share their code; and a number that no other process has, so that an exported program finds its own layers or none.
"""

from __future__ import annotations

import secrets
import weakref

import torch
from torch import Tensor

from .autograd import Call, bias_gradient, no_autocast, with_norm
from .dora import Kept, backward, forward

_weights: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
"""Handle → adapted weight: how an op finds its layer. Nothing of one model can be reached with another's handle."""

NO_ONNX = "ONNX has no operator for an adapted layer; call doratune.merge(model) first and export that: it says the same"

_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


class Handle:
    """A number by which an op finds its weight; copies of a layer get one of their own."""

    def __init__(self):
        with torch.inference_mode(False):
            self.tensor = torch.tensor(secrets.randbits(62), device="cpu")

    def bind(self, weight) -> None:
        _weights[self.tensor.item()] = weight

    def bound(self) -> bool:
        return self.tensor.item() in _weights

    def __deepcopy__(self, memo):
        return Handle()

    def __reduce__(self):
        return Handle, ()


def _refuse_onnx() -> None:
    """For the ops' fake forms: traced code itself takes the question whether it is for ONNX for a constant."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(NO_ONNX)


def weight_of(handle: Tensor):
    weight = _weights.get(handle.item())
    if weight is None or weight.layer is None:
        raise RuntimeError("the adapted layer of this compiled graph is not in this process; attach, then compile or export again")
    return weight


def compose(weight, x: Tensor, out: Tensor, bias: Tensor | None, mask: Tensor | None, keep: float) -> Tensor:
    """y (…, O) in traced code, from the base's output; a direction alone is left to the compiler as plain products."""
    if weight.magnitude and weight.axis == "output":
        return _run(weight, x, out, bias, mask, keep, False, out.dtype)
    A, B = weight.low_rank()
    if A is None:
        return out
    dtype = out.dtype
    with torch.autocast(out.device.type, enabled=False):
        x = x.to(dtype) if mask is None else x.to(dtype) * mask.view(x.shape)
        return out + (x @ A.to(dtype).T) @ (B.to(dtype) * (weight.scaling / keep)).T


def rescale(weight, x: Tensor | None, out: Tensor, bias: Tensor | None, low: torch.dtype) -> Tensor:
    """out + (g − 1) ⊙ (out − bias) in traced code; see `AdaptedWeight.rescale`."""
    return _run(weight, x, out, bias, None, 1.0, True, low)


def _run(weight, x, out, bias, mask, keep: float, rescaled: bool, low: torch.dtype) -> Tensor:
    width = 0 if rescaled or not weight.rank else weight.direction.width(weight.shape, weight.rank)
    x = x if bias is not None or not rescaled else None
    plain = weight.base.weight(weight.layer) if weight.base.writable else None
    settings = keep, weight.s, rescaled, low, width, weight.handle.tensor
    return _compose(x, out, bias, mask, list(weight.tensors()), plain, *settings)[0]


def _call(weight, bias: Tensor | None, mask: Tensor | None, keep: float, s: float, rescaled, low: torch.dtype, again=False) -> Call:
    weight.scale_by(s)
    f = weight.ready(low, again=again)
    if bias is not None and f.bias is None and f.g is not None:
        f = f.with_bias(bias)
    return Call(weight, f, False, mask, keep, None, rescaled)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


@torch.library.custom_op("doratune::compose", mutates_args=(), tags=_TAGS)
def _compose(
    x: Tensor | None, out: Tensor, bias: Tensor | None, mask: Tensor | None, tensors: list[Tensor], W: Tensor | None,
    keep: float, s: float, rescaled: bool, low: torch.dtype, width: int, handle: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y in out's shape, z = x·Aᵀ (T, width) or empty). x (…, I), out (…, O), or what `rescale` takes."""
    weight = weight_of(handle)
    weight.calls += 1
    with weight.standing_in(tensors, W), no_autocast(out.device):
        call = _call(weight, bias, mask, keep, s, rescaled, low)
        y, z = forward(call.factors, None if rescaled else _rows(x), out if rescaled else _rows(out), mask, keep)
        y = y.view(out.shape).contiguous().data  # no view to autograd: a later operation may change it in place
    return y, out.new_empty(0, 0) if z is None else z


@_compose.register_fake
def _(x, out, bias, mask, tensors, W, keep, s, rescaled, low, width, handle):
    _refuse_onnx()
    y = out.new_empty(out.shape)
    return y, out.new_empty(out.shape[:-1].numel() if width else 0, width)


@torch.library.custom_op("doratune::compose_backward", mutates_args=(), tags=_TAGS)
def _compose_backward(
    dY: Tensor, x: Tensor | None, out: Tensor | None, bias: Tensor | None, mask: Tensor | None, z: Tensor,
    tensors: list[Tensor], W: Tensor | None, keep: float, s: float, rescaled: bool, low: torch.dtype, x_dtype: torch.dtype,
    in_features: int, handle: Tensor, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed ones of (dx, dout, dbias, *dtensors), in this order."""
    weight = weight_of(handle)
    with weight.standing_in(tensors, W), no_autocast(dY.device):
        call = _call(weight, bias, mask, keep, s, rescaled, low, again=True)
        wanted, f, given = call.wanted((needs[0], needs[1], needs[2], False, *needs[3:])), call.factors, tuple(tensors)
        shape, dY = dY.shape, dY if rescaled else _rows(dY)
        x_TI = None if x is None else x if rescaled else _rows(x)
        drowning = f.drowned and x is not None and wanted.m
        out = out if rescaled or out is None else _rows(out)
        care = weight.registry.care(weight.registry.size_of(f, out), None) if drowning else None
        kept = Kept(x_TI, z if z.shape[1] else None, out, False, mask, keep, care)

        def low_B() -> Tensor:
            return weight.low_rank(given)[1].to(dY.dtype)

        dx, dout, dA, dB, dm = backward(f, wanted, dY, kept, weight, low_B)
        if weight.full_gradient and dm is not None and (wanted.A or wanted.B):
            dA, dB = with_norm(weight, given, low, f.g * dm * f.per_n, dA, dB)
        dx = None if dx is None else dx.to(x_dtype).view(*shape[:-1], in_features)
        dout = None if dout is None else dout.view(shape)
        dbias = bias_gradient(call, dY).to(bias.dtype) if needs[2] else None
        grads = dx, dout, dbias, *weight.pull_back(given, dA, dB, dm, tuple(needs[3:]))
    places = None, None, bias, *tensors
    some = [torch.zeros_like(p) if g is None else g for g, p, need in zip(grads, places, needs, strict=True) if need]
    return [g.contiguous() for g in some]


@_compose_backward.register_fake
def _(dY, x, out, bias, mask, z, tensors, W, keep, s, rescaled, low, x_dtype, in_features, handle, needs):
    makers = [lambda: dY.new_empty(*dY.shape[:-1], in_features, dtype=x_dtype), lambda: dY.new_empty(dY.shape)]
    makers += [lambda t=t: t.new_empty(t.shape) for t in (bias, *tensors)]
    return [make() for make, needed in zip(makers, needs, strict=True) if needed]


def _setup(ctx, inputs, output):
    x, out, bias, mask, tensors, W, ctx.keep, ctx.s, ctx.rescaled, ctx.low, width, handle = inputs
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.needs = [bool(need) for need in (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4 : 4 + len(tensors)])]
    ctx.needs[0] = ctx.needs[0] and width > 0
    ctx.x_dtype, ctx.in_features = (out.dtype, 0) if x is None else (x.dtype, x.shape[-1])
    # the base's output is kept, not y: compiled code may change y in place, which autograd would refuse for a saved output
    trains = any(ctx.needs[3:])
    x_kept = x if trains and (not ctx.rescaled or bias is not None) else None
    ctx.save_for_backward(x_kept, out if trains else None, bias, mask, z, W, handle, *tensors)


def _backward(ctx, dY, _):
    x, out, bias, mask, z, W, handle, *tensors = ctx.saved_tensors
    settings = ctx.keep, ctx.s, ctx.rescaled, ctx.low, ctx.x_dtype, ctx.in_features, handle, ctx.needs
    grads = iter(_compose_backward(dY, x, out, bias, mask, z, tensors, W, *settings))
    dx, dout, dbias, *own = (next(grads) if needed else None for needed in ctx.needs)
    return dx, dout, dbias, None, own, None, None, None, None, None, None, None


_compose.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("doratune::frozen_rows", mutates_args=(), tags=_TAGS)
def frozen_rows(ids: Tensor, W: Tensor, handle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w² in `dtype`, is the row without direction?) of the looked-up rows of an embedding, in the shape of ids."""
    weight = weight_of(handle)
    weight.calls += 1
    with weight.standing_in((), W):
        w2, directionless, _ = weight.facts
    return w2[ids].to(dtype), directionless[ids]


@frozen_rows.register_fake
def _(ids, W, handle, dtype):
    _refuse_onnx()
    return ids.new_empty(ids.shape, dtype=dtype), ids.new_empty(ids.shape, dtype=torch.bool)
