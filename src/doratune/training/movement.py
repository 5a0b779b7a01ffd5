"""How far training moved an adapter: mean |Δm|/m and mean 1 − cos(W + s·B·A, W) (§3.2), from the factors alone.

A magnitude that did not move is the mark of DoRA that silently was not DoRA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..adapter.attach import adapters
from ..math.decomposition import movement


@dataclass(frozen=True)
class Movement:
    """Means over all rows (columns) with a direction; None where there is nothing of the kind."""

    magnitude: float | None
    direction: float | None

    def __str__(self) -> str:
        parts = []
        if self.magnitude is not None:
            parts.append(f"the magnitude moved {100 * self.magnitude:.3g} % (mean |dm|/m)")
        if self.direction is not None:
            parts.append(f"the direction {self.direction:.3g} (mean 1 - cos)")
        return ", ".join(parts)

    @property
    def warning(self) -> str | None:
        if self.magnitude == 0.0:
            return "the magnitude did not move: check that m is in the optimizer and its learning rate is not 0"
        return None


@torch.no_grad()
def measure(model: nn.Module) -> Movement:
    """The movement of an attached model's adapter, against the frozen weight."""
    magnitudes, directions = [], []
    for weight in (part for _, layer in adapters(model) for part in layer.adapted.matrices()):
        w2, frozen, _ = weight.facts
        A, B = weight.low_rank()
        if A is None:
            zero = torch.zeros_like(w2)
            dm, turn = movement(weight.m(), w2.sqrt(), w2, zero, zero, frozen)
        else:
            t = weight.terms(A.to(weight.dtype), B.to(weight.dtype))
            m = weight.m() if weight.magnitude else w2.sqrt()
            dm, turn = movement(m, t.n, w2, t.cross, t.ba2, frozen)
            directions.append(turn)
        if weight.magnitude:
            magnitudes.append(dm)
    return Movement(_mean(magnitudes), _mean(directions))


def _mean(parts: list[torch.Tensor]) -> float | None:
    return torch.cat([p.flatten().cpu() for p in parts]).double().mean().item() if parts else None
