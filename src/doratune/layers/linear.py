"""nn.Linear, W stored (O, I): y = out + (g − 1) ⊙ (out − bias) + (x·Aᵀ)·(s·g ⊙ B)ᵀ on the output axis; x̃ = g ⊙ x in front on the
input axis (Eq. 5). Also whatever stores W and has a forward y = x·Wᵀ + bias (`bases/`).

Cost: where the forward is just that product, it is made in the op, which then adds into it and into its input's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bases import is_opaque
from ..math.autograd import BaseGradient, any_autocast
from .kind import LayerKind, differs, outside_compile
from .weight import compute_dtype


class LinearKind(LayerKind):
    name = "Linear"
    may_be_quantized = True
    splits = True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_opaque(module)

    def forward(self, layer, x: Tensor, *args, **kwargs) -> Tensor:
        weight, own = layer.adapted, layer._parameters
        if torch.compiler.is_compiling():
            return self.traced(layer, x, *args, **kwargs)
        weight.calls += 1
        if weight.axis == "input" and weight.magnitude:
            x = weight.scaled_input(x, compute_dtype(x))
        # where this call is just a product with W in x's dtype, the op may compute it
        if weight.own_product and not (args or kwargs):
            W, bias = (own["weight"], own["bias"]) if own else (layer.weight, layer.bias)
            autocast = any_autocast() and torch.is_autocast_enabled(x.device.type)
            if W.dtype == x.dtype and not W.requires_grad and not autocast:
                return weight.composed(x, W, bias, own=True)
        return self.around(layer, x, *args, **kwargs)

    def traced(self, layer, x: Tensor, *args, **kwargs) -> Tensor:
        """A call in code that torch.compile traces."""
        weight = layer.adapted
        if not weight.base.has_gradient:
            return _unseen(self, layer, x, *args, **kwargs)  # autograd would lose x where the compiler looks
        if weight.axis == "input" and weight.magnitude:
            x = weight.scaled_input(x, compute_dtype(x))
        out = layer.base_forward(x, *args, **kwargs)
        return out if not weight.rank and weight.axis == "input" else weight.compose(x, out, getattr(layer, "bias", None))

    def around(self, layer, x: Tensor, *args, **kwargs) -> Tensor:
        """A call around the layer's own forward."""
        weight = layer.adapted
        own_gradient = x.requires_grad and torch.is_grad_enabled()
        out = layer.base_forward(x.detach() if own_gradient and not weight.base.has_gradient else x, *args, **kwargs)
        if own_gradient and not (weight.base.has_gradient and out.requires_grad):
            out = BaseGradient.apply(x, out, weight)
        return out if not weight.rank and weight.axis == "input" else weight.compose(x, out, getattr(layer, "bias", None))

    def finishes(self, weight) -> bool:
        return weight.split is None and not (weight.magnitude and weight.axis == "input")

    def finish(self, layer, x: Tensor, out: Tensor) -> Tensor:
        layer.adapted.calls += 1
        return layer.adapted.compose(x, out, getattr(layer, "bias", None))

    def own_product(self, weight, cls: type) -> bool:
        """Is the forward of this plain class just x·Wᵀ + bias with a plain W?"""
        return cls.forward is nn.Linear.forward and weight.base.writable and weight.rank > 0

    def output_columns(self, weight, x: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([x.to(tile.dtype) @ tile.T for _, tile in weight.row_tiles(rows)], 1)

    def probe(self, module: nn.Module) -> str | None:
        """A subclass with a forward of its own must compute x·Wᵀ + bias: tried on two rows."""
        base = self.base(module)
        if not base.writable:
            return base.trial(module)
        if type(module).forward is self.plain_forward() or base.device(module).type == "meta":
            return None
        weight = base.matrix(module)
        x = torch.linspace(-1, 1, 2 * weight.shape[1]).view(2, -1).to(weight)
        return differs(module, (x,), nn.functional.linear(x, weight, module.bias), "x·Wᵀ + bias")

    def plain_forward(self):
        return nn.Linear.forward


@outside_compile
def _unseen(kind, layer, x, *args, **kwargs):
    """`forward` over a base without gradient, which never asks whether code is traced: PyTorch may say so here, too."""
    weight = layer.adapted
    weight.calls += 1
    if weight.axis == "input" and weight.magnitude:
        x = weight.scaled_input(x, compute_dtype(x))
    return kind.around(layer, x, *args, **kwargs)
