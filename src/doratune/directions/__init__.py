"""How ΔV is made: the `Direction` protocol.

A direction owns trainable tensors and offers the two factors A (K, I) and B (O, K) of ΔV = s·B·A, differentiable in what it
trains; the norm, the op, merging and every layer kind see A and B only. A new direction is one new file here and a line below.
"""

from typing import Protocol

from torch import Tensor, nn


class Direction(Protocol):
    name: str
    names: tuple[str, ...]
    """Names of the parameters that it may register on a module."""
    frozen: tuple[str, ...] = ()
    """Those of them that are never trained."""

    def create(self, module: nn.Module, shape: tuple[int, int], rank: int, seed: int, dtype, device) -> None:
        """Register this direction's parameters on the module; ΔV = 0 at the start."""

    def factors(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """(A (K, I), B (O, K)) as the forward uses them."""

    def sources(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The tensors that A and B are made of: while they stay, A and B stay."""

    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        """Parameter name → shape, for a layer of shape (O, I)."""

    def refusal(self, shape: tuple[int, int], rank: int) -> str | None:
        """Why a layer of this shape cannot have this direction, or None."""


def register(module: nn.Module, name: str, value: Tensor | None, device) -> None:
    module.register_parameter(name, None if value is None else nn.Parameter(value.to(device)))


def too_large(shape: tuple[int, int], rank: int) -> str | None:
    """Why a rank does not fit a matrix, or None."""
    return f"rank {rank} is larger than its smaller side, {min(shape)}" if 0 < min(shape) < rank else None


def direction_for(config, rank: int, shared) -> Direction:
    """The direction that a configuration gives a layer of this rank; shared: the frozen pair of VeRA's layers."""
    from . import lora, products, starts, vera

    if not rank:
        return lora.NONE
    if config.direction == "vera":
        return vera.VeRADirection(shared)
    if config.start in ("pissa", "olora"):
        return starts.OFFSET
    return {"lora": lora.LORA, "loha": products.LOHA, "lokr": products.LOKR}[config.direction]
