"""nn.Linear, W stored (O, I), and transformers' Conv1D (GPT-2), stored (I, O): one maths, two views of the weight.

y = out + (g − 1) ⊙ (out − bias) + (x·Aᵀ)·(s·g ⊙ B)ᵀ on the output axis; x̃ = g ⊙ x in front on the input axis (Eq. 5).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ..bases import is_opaque
from ..math.autograd import BaseGradient, ComposeLinear
from ..math.compose import infer
from .calls import composed, dropout_mask, flat, outside_compile, scaled_input
from .kind import LayerKind, differs


class LinearKind(LayerKind):
    """A linear layer y = x·Wᵀ + bias, whatever stores W."""

    name = "Linear"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_opaque(module)

    def own_weight(self, module: nn.Module) -> Tensor | None:
        """W (O, I), where the layer's forward is just x·Wᵀ + bias, so that the op may compute it."""
        plain = type(module).plain_class.forward is nn.Linear.forward
        return module.weight if plain and module.adaptation.base.name == "dense" else None

    def _plain_product(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """W, where this call of the layer is just a product with it in x's dtype."""
        W = self.own_weight(module)
        plain = W is not None and W.dtype == x.dtype and not W.requires_grad and not torch.is_autocast_enabled(x.device.type)
        return W if plain else None

    def forward(self, module, base_forward, x, *args, **kwargs):
        if torch.compiler.is_compiling() and not module.adaptation.base.has_gradient:
            return _unseen(self, module, base_forward, x, *args, **kwargs)  # autograd would lose x where the compiler looks
        return self.adapted(module, base_forward, x, *args, **kwargs)

    def adapted(self, module, base_forward, x, *args, **kwargs):
        a = module.adaptation
        (A, B), m, bias = a.factors_of(module), module.magnitude, getattr(module, "bias", None)
        traced, gradients = torch.compiler.is_compiling(), torch.is_grad_enabled()
        site = None if traced else module.op_site(gradients, count=True)
        if m is not None and a.axis == "input":
            x, m = scaled_input(module, site, x, A, B, m), None
        x_TI = flat(x) if A is not None else None
        mask, keep = dropout_mask(module, x_TI)
        if not traced and A is not None and not args and not kwargs and (W := self._plain_product(module, x)) is not None:
            if gradients:
                return ComposeLinear.apply(x_TI, W, A, B, m, bias, mask, keep, site).view(*x.shape[:-1], len(W))
            if mask is None and may_overwrite():
                out_TO = nn.functional.linear(x_TI, W, bias)
                return infer(site, x_TI, out_TO, A, B, m, bias, fresh=True).view(*x.shape[:-1], len(W))
        own_gradient = gradients and x.requires_grad and not traced
        out = base_forward(x.detach() if own_gradient and not a.base.has_gradient else x, *args, **kwargs)
        if own_gradient and not (a.base.has_gradient and out.requires_grad):
            out = BaseGradient.apply(x, out, site)
        if A is None and m is None:
            return out
        return composed(module, x_TI, flat(out), A, B, m, bias, (mask, keep), site).view(out.shape)

    def probe(self, module: nn.Module) -> str | None:
        """A subclass with a forward of its own must compute x·Wᵀ + bias: tried on two rows."""
        base, plain = self.base(module), self.plain_forwards()
        if base.name != "dense":
            return base.trial(module)
        if type(module).forward in plain or base.device(module).type == "meta":
            return None
        weight = base.matrix(module)
        x = torch.linspace(-1, 1, 2 * weight.shape[1]).view(2, -1).to(weight)
        return differs(module, (x,), nn.functional.linear(x, weight, module.bias), "x·Wᵀ + bias")

    def plain_forwards(self) -> tuple:
        conv1d = _conv1d()
        return (nn.Linear.forward, conv1d.forward) if conv1d else (nn.Linear.forward,)


class Conv1DKind(LinearKind):
    """transformers' Conv1D: a linear layer whose weight is stored (I, O)."""

    name = "Conv1D"

    def matches(self, module: nn.Module) -> bool:
        conv1d = _conv1d()
        return conv1d is not None and isinstance(module, conv1d)

    def own_weight(self, module: nn.Module) -> None:
        return None

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def rows(self, weight: Tensor, which, flatten: bool = True) -> Tensor:
        return weight.T[which]


@outside_compile
def _unseen(kind, *args, **kwargs):
    return kind.adapted(*args, **kwargs)


def may_overwrite() -> bool:
    """May an output of our own product be written over, outside autograd? Not where a mode may hold it, nor in forward mode."""
    return torch.autograd.forward_ad._current_level < 0 and not torch._C._len_torch_dispatch_stack()


def _conv1d() -> type | None:
    """transformers' Conv1D, if transformers is loaded at all."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
