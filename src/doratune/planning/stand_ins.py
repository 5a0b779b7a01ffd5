"""Layers that allocate what adapted and quantized layers allocate, in forward and backward, and compute nothing of use: for fake
tensors, which have shapes and no numbers. The real layers read numbers (norms, guards against cancellation, hashes).

    PackedLinear    a linear layer whose weight is packed: W is dequantized for each product and dropped
    Composed        y = g ⊙ out + z·Bᵀ: keeps x, z = x·Aᵀ and y (`math/autograd.py`); where a layer's forward is one product with a
                    plain W, that product is made inside and y takes its place
    Scaled          x̃ = g ⊙ x in front of a layer, on the input axis
    Rescaled        y = g ⊙ (out + low-rank part) of a convolution, whose parts are convolutions that autograd differentiates

`tests/planning` holds each against the bytes that the real layers keep. Costs nothing but shapes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..layers.conv import CONVS, low_rank

BLOCK, BLOCKS = 64, 256
"""Numbers that share a scale, and scales that share theirs under double quantization (bitsandbytes' defaults)."""


class PackedLinear(nn.Module):
    """A linear layer of bitsandbytes: `kind` nf4, fp4 or int8."""

    def __init__(self, linear: nn.Linear, kind: str, double: bool):
        super().__init__()
        self.in_features, self.out_features, self.kind, self.double = linear.in_features, linear.out_features, kind, double
        self.dtype, self.bias, numbers = linear.weight.dtype, linear.bias, linear.weight.numel()
        self.blocks = -(-numbers // BLOCK)
        self.register_buffer("packed", torch.empty(numbers if kind == "int8" else -(-numbers // 2), dtype=torch.uint8))
        scales = linear.out_features if kind == "int8" else self.blocks
        nested = double and kind != "int8"
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8 if nested else torch.float32))
        self.register_buffer("outer", torch.empty(-(-scales // BLOCKS) if nested else 0, dtype=torch.float32))

    def dequantized(self) -> Tensor:
        if self.double and self.kind != "int8":
            _ = self.packed.new_empty(self.blocks, dtype=torch.float32)
        return self.packed.new_empty(self.out_features, self.in_features, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _PackedProduct.apply(x, self)


class _PackedProduct(Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.x = x if layer.kind == "int8" else None  # bitsandbytes keeps the input of its 8-bit layers
        return F.linear(x, layer.dequantized().to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx, dY: Tensor):
        return torch.matmul(dY, ctx.layer.dequantized().to(dY.dtype)), None


class Adapter(nn.Module):
    """The parameters of one adapted layer and its factors; `around` is its call.

    Args:
        shapes: of the direction's tensors and of m, in `wide`; trained: names of those that learn.
        learns_A: is x kept for A's gradient, so that m's is read off y, not off the base's output?
        keeps_product: is U = W·Aᵀ kept, since A is constant and norm_memory leaves room?
        shape: (O, I); width: rank of the pair of factors, 0 for magnitude only.
        axis: of m: output, input or None; dropout: of the low-rank branch.
        wide, low: dtype of the parameters, and in which the layer computes.
        shared_A: (R, at least I) of all layers; None: each has an A of its own.
    """

    def __init__(
        self, shapes, trained, learns_A: bool, keeps_product: bool, shape, width: int, axis, dropout, wide, low, shared_A=None
    ):
        super().__init__()
        self.axis, self.dropout, self.width, self.learns_A = axis, dropout, width, learns_A
        for name, size in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=wide), requires_grad=name in trained))
        rows, columns = shape
        vectors = {"output": 6 * rows + rows // 4, "input": 5 * columns, None: 0}[axis]
        self.factors = {
            "A": torch.empty(width, columns, dtype=low) if width and shared_A is None else None,
            "B": torch.empty(rows, width, dtype=low) if width else None,
            "vectors": torch.empty(vectors, dtype=wide),
            "product": torch.empty(rows, width, dtype=low) if keeps_product else None,
        }
        self.A = self.factors["A"] if shared_A is None else shared_A[:, :columns]

    def around(self, layer: nn.Module, x: Tensor, own_product: bool, call) -> Tensor:
        if self.axis == "input":
            x = _Scaled.apply(x, self, *self.parameters())
        if not self.width and self.axis != "output":
            return call(x)
        mask = torch.empty(x.shape, dtype=torch.bool) if self.dropout and self.width and layer.training else None
        if own_product:
            return _Composed.apply(x, layer.weight, layer.bias, True, self, mask, *self.parameters())
        return _Composed.apply(x, call(x), None, False, self, mask, *self.parameters())


class _Scaled(Function):
    @staticmethod
    def forward(ctx, x: Tensor, adapter: Adapter, *parameters) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parameters = parameters
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dY: Tensor):
        needs = ctx.needs_input_grad[2:]
        last = [need and i == len(needs) - 1 for i, need in enumerate(needs)]  # m stands behind the direction's tensors
        grads = [torch.empty_like(p) if need else None for p, need in zip(ctx.parameters, last)]
        return torch.empty_like(dY), None, *grads


class _Composed(Function):
    """base: W (O, I) if `own`, else the base's output."""

    @staticmethod
    def forward(ctx, x: Tensor, base: Tensor, bias, own: bool, adapter: Adapter, mask, *parameters) -> Tensor:
        out = F.linear(x, base, bias) if own else base
        x_TI = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        z = None
        if adapter.width:
            inner = x_TI if mask is None else torch.ops.aten.native_dropout_backward.default(x_TI, mask.view(x_TI.shape), 2.0)
            z = torch.mm(inner.to(out.dtype), adapter.A.t())
            del inner
        has_m, from_y = adapter.axis == "output", adapter.learns_A
        result = out.view(out.shape).data if own and (from_y or not has_m) else torch.empty_like(out)
        kept = None if not has_m else result.data if from_y else out
        ctx.save_for_backward(x if adapter.learns_A else None, base if own else None, z, kept, mask)
        ctx.adapter, ctx.own, ctx.parameters, ctx.shape = adapter, own, parameters, x.shape
        return result

    @staticmethod
    def backward(ctx, dY: Tensor):
        x, W, z, _, _ = ctx.saved_tensors
        adapter = ctx.adapter
        dY_TO = dY.reshape(math.prod(dY.shape[:-1]), dY.shape[-1])
        products = torch.mm(dY_TO.t(), z) if z is not None else None
        dout = torch.empty_like(dY_TO) if adapter.axis == "output" else dY_TO
        dx = None
        if adapter.width:
            dZ = torch.mm(dY_TO, adapter.factors["B"])
            dA = torch.mm(dZ.t(), x.reshape(-1, x.shape[-1]).to(dY.dtype)) if adapter.learns_A else None
            dx = torch.mm(dZ, adapter.A)
            del dA, dZ
        if ctx.own:
            dx = torch.mm(dout, W) if dx is None else dx.addmm_(dout, W)
        grads = [torch.empty_like(p) if need else None for p, need in zip(ctx.parameters, ctx.needs_input_grad[6:])]
        del products
        dx = None if dx is None or not ctx.needs_input_grad[0] else dx.view(ctx.shape)
        return dx, None if ctx.own else dout.view(dY.shape), None, None, None, None, *grads


class _Factor(Function):
    """A or B as a convolution sees it: prepared already, with the gradients of the adapter's parameters behind it."""

    @staticmethod
    def forward(ctx, factor: Tensor, *parameters) -> Tensor:
        ctx.parameters = parameters
        return factor.detach()

    @staticmethod
    def backward(ctx, dF: Tensor):
        needs = ctx.needs_input_grad[1:]
        return None, *(torch.empty_like(p) if need else None for p, need in zip(ctx.parameters, needs))


class _Rescaled(Function):
    @staticmethod
    def forward(ctx, out: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(out if m.requires_grad else None)
        ctx.m = m
        return torch.empty_like(out)

    @staticmethod
    def backward(ctx, dY: Tensor):
        return torch.empty_like(dY), torch.empty_like(ctx.m) if ctx.needs_input_grad[1] else None


class SharedConv(nn.Module):
    """Mixin in front of the class of a convolution with a stand-in of an adapter (`layers/conv.py`)."""

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        if adapter.axis == "input":
            x = _Scaled.apply(x, adapter, *adapter.parameters())
        out = super().forward(x)
        if adapter.width:
            *own, m = adapter.parameters() if adapter.axis == "output" else (*adapter.parameters(), None)
            A, B = _Factor.apply(adapter.A, *own[:1]), _Factor.apply(adapter.factors["B"], *own[1:])
            out = out + low_rank(_OfConv(adapter.dropout), self, x, A, B, out.dtype)
        if adapter.axis == "output":
            out = _Rescaled.apply(out, list(adapter.parameters())[-1])
        return out


class _OfConv(NamedTuple):
    """What `layers.conv.low_rank` asks of an adapted weight."""

    dropout: float
    s: float = 1.0


def stand_in_of(module: nn.Module | None) -> type | None:
    """The mixin that a layer of this class gets with an adapter; None where none is known."""
    if isinstance(module, (nn.Linear, Conv1D, PackedLinear)):
        return Shared
    return SharedConv if isinstance(module, CONVS) else None


class Shared(nn.Module):
    """Mixin in front of the class of a layer with a stand-in of an adapter."""

    adapter: Adapter
    own_product: bool

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        own = self.own_product and not torch.is_autocast_enabled(x.device.type) and self.weight.dtype == x.dtype
        return self.adapter.around(self, x, own, lambda inner: super(Shared, self).forward(inner, *args, **kwargs))
