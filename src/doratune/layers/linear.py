"""nn.Linear, W stored (O, I), and transformers' Conv1D (GPT-2), stored (I, O): one maths, two views of the weight."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ..bases.dense import DenseBase


def weight_as_it_is(module: nn.Module) -> Tensor:
    return module.weight


def weight_transposed(module: nn.Module) -> Tensor:
    return module.weight.T


class LinearKind:
    """A dense layer y = x·Wᵀ + bias."""

    def __init__(self, name: str, matrix):
        self.name = name
        self.base = DenseBase(matrix)

    def __reduce__(self):
        return _kind_named, (self.name,)

    def matches(self, module: nn.Module) -> bool:
        if self.name == "Linear":
            return isinstance(module, nn.Linear)
        conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
        return conv1d is not None and isinstance(module, conv1d)

    def refusal(self, module: nn.Module) -> str | None:
        """Why this module cannot be adapted, or None."""
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor or weight.dim() != 2:
            return f"its weight is a {type(weight.data).__name__} of a storage that this version cannot adapt"
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"its weight is {weight.dtype}; quantized bases come with a later version"
        return None


def _kind_named(name: str) -> LinearKind:
    return LINEAR if name == "Linear" else CONV1D


LINEAR = LinearKind("Linear", weight_as_it_is)
CONV1D = LinearKind("Conv1D", weight_transposed)
