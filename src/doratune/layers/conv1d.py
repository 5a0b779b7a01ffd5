"""transformers' Conv1D (GPT-2): a linear layer whose weight is stored (I, O)."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from .linear import LinearKind


class Conv1DKind(LinearKind):
    name = "Conv1D"
    may_be_quantized = False
    transposed = True

    def matches(self, module: nn.Module) -> bool:
        conv1d = _conv1d()
        return conv1d is not None and isinstance(module, conv1d)

    def own_product(self, weight, cls: type) -> bool:
        return False

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def rows(self, weight: Tensor, which, flatten: bool = True) -> Tensor:
        return weight.T[which]

    def plain_forward(self):
        return getattr(_conv1d(), "forward", None)


def _conv1d() -> type | None:
    """transformers' Conv1D, if transformers is loaded at all."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
