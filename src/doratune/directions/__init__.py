"""How ΔV is made: the `Direction` protocol.

A direction owns trainable tensors and offers the two factors A (R, I) and B (O, R) of ΔV = s·B·A, differentiable in what it
trains. A new direction (VeRA) is one new file here.
"""

from typing import Protocol

from torch import Tensor, nn


class Direction(Protocol):
    def create(self, module: nn.Module, shape: tuple[int, int], rank: int, seed: int, dtype, device) -> None:
        """Register this direction's parameters on the module; ΔV = 0 at the start."""

    def names(self) -> tuple[str, ...]:
        """Names of the parameters that it registers."""

    def factors(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """(A, B) as the forward uses them."""
