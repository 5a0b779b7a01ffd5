"""nn.Linear, W stored (O, I): y = out + (g − 1) ⊙ (out − bias) + (x·Aᵀ)·(s·g ⊙ B)ᵀ on the output axis; x̃ = g ⊙ x in front on the
input axis (Eq. 5). Also whatever stores W and has a forward y = x·Wᵀ + bias (`bases/`).

Cost: where the forward is just that product, it is made in the op, which then adds into it and into its input's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bases import is_opaque
from ..math.autograd import BaseGradient
from .kind import LayerKind, differs, outside_compile
from .weight import compute_dtype


class LinearKind(LayerKind):
    name = "Linear"
    may_be_quantized = True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_opaque(module)

    def forward(self, layer, base_forward, x: Tensor, *args, **kwargs) -> Tensor:
        weight = layer.adapted
        traced = torch.compiler.is_compiling()
        if traced and not weight.base.has_gradient:
            return _unseen(self, layer, base_forward, x, *args, **kwargs)  # autograd would lose x where the compiler looks
        return self.adapted(layer, base_forward, traced, x, *args, **kwargs)

    def adapted(self, layer, base_forward, traced: bool, x: Tensor, *args, **kwargs) -> Tensor:
        weight = layer.adapted
        if not traced:
            weight.calls += 1
        if weight.axis == "input" and weight.magnitude:
            x = weight.scaled_input(x, compute_dtype(x))
        if not traced and not args and not kwargs and (W := self.own_weight(layer, x)) is not None:
            return weight.compose(x, W, layer.bias, own=True)
        own_gradient = not traced and x.requires_grad and torch.is_grad_enabled()
        out = base_forward(x.detach() if own_gradient and not weight.base.has_gradient else x, *args, **kwargs)
        if own_gradient and not (weight.base.has_gradient and out.requires_grad):
            out = BaseGradient.apply(x, out, weight)
        if not weight.rank and weight.axis == "input":
            return out
        return weight.compose(x, out, getattr(layer, "bias", None))

    def own_weight(self, layer, x: Tensor) -> Tensor | None:
        """W (O, I), where this call of the layer is just a product with it in x's dtype, so that the op may compute it."""
        weight = layer.adapted
        if type(layer).plain_class.forward is not nn.Linear.forward or not weight.base.writable or not weight.rank:
            return None
        W = layer.weight
        plain = W.dtype == x.dtype and not W.requires_grad and not torch.is_autocast_enabled(x.device.type)
        return W if plain else None

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
def _unseen(kind, layer, base_forward, x, *args, **kwargs):
    return kind.adapted(layer, base_forward, False, x, *args, **kwargs)
