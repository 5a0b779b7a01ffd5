"""nn.Linear, W stored (O, I), and transformers' Conv1D (GPT-2), stored (I, O): one maths, two views of the weight."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ..bases.dense import DenseBase

RESERVED = ("adaptation", "lora_A", "lora_B", "magnitude", "scaling")
"""Names that an adapted layer gives to a module."""


def weight_as_it_is(module: nn.Module) -> Tensor:
    return module.weight


def weight_transposed(module: nn.Module) -> Tensor:
    return module.weight.T


class LinearKind:
    """A dense layer y = x·Wᵀ + bias."""

    def __init__(self, name: str, matrix):
        self.name = name
        self.matrix = matrix
        self.base = DenseBase(matrix)

    def __reduce__(self):
        return _kind_named, (self.name,)

    def matches(self, module: nn.Module) -> bool:
        if self.name == "Linear":
            return isinstance(module, nn.Linear)
        conv1d = _conv1d()
        return conv1d is not None and isinstance(module, conv1d)

    def own_weight(self, module: nn.Module) -> Tensor | None:
        """W (O, I), where the layer's forward is just x·Wᵀ + bias, so that the op may compute it."""
        plain = self.name == "Linear" and type(module).plain_class.forward is nn.Linear.forward
        return module.weight if plain and type(module.weight.data) is Tensor else None

    def refusal(self, module: nn.Module) -> str | None:
        """Why this module cannot be adapted, or None."""
        weight = module.weight
        if taken := [name for name in RESERVED if hasattr(module, name)]:
            return f"its class {type(module).__name__} has an attribute {taken[0]!r} of its own"
        if "forward" in vars(module) and not _calls_its_class(module):
            return "its forward was replaced on the instance, so an adapter there would do nothing"
        if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor or weight.dim() != 2:
            return f"its weight is a {type(weight.data).__name__} of a storage that this version cannot adapt"
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"its weight is {weight.dtype}; quantized bases come with a later version"
        return self._probe(module)

    @torch.no_grad()
    def _probe(self, module: nn.Module) -> str | None:
        """A subclass with a forward of its own must compute x·Wᵀ + bias: tried on two rows."""
        weight, plain = self.matrix(module), self.plain_forwards()
        if type(module).forward in plain or weight.is_meta:
            return None
        x = torch.linspace(-1, 1, 2 * weight.shape[1]).view(2, -1).to(weight)
        expected = nn.functional.linear(x, weight, module.bias)
        try:
            got = module(x)
            same = torch.is_tensor(got) and (got - expected).norm() <= 1e-2 * expected.norm()
        except Exception as error:  # any forward of any class
            return f"its forward fails on a plain tensor ({type(error).__name__})"
        return None if same else f"the forward of {type(module).__name__} is not x·Wᵀ + bias"

    def plain_forwards(self) -> tuple:
        conv1d = _conv1d()
        return (nn.Linear.forward, conv1d.forward) if conv1d else (nn.Linear.forward,)


def _calls_its_class(module: nn.Module) -> bool:
    """Does a forward that was put on the instance (by accelerate's hooks) end in the class's own?"""
    held = (vars(module).get(name) for name in ("forward", "_old_forward"))
    return any(getattr(f, "__func__", None) is type(module).forward for f in held)


def _conv1d() -> type | None:
    """transformers' Conv1D, if transformers is loaded at all."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _kind_named(name: str) -> LinearKind:
    return LINEAR if name == "Linear" else CONV1D


LINEAR = LinearKind("Linear", weight_as_it_is)
CONV1D = LinearKind("Conv1D", weight_transposed)
