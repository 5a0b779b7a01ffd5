"""How far training moved an adapter, in one line: mean |Δm|/m and mean 1 − cos(W + s·B·A, W) (§3.2), as `analysis` measures them.

A magnitude that did not move is the mark of DoRA that silently was not DoRA. Cost: see `analysis.change`, once a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..analysis.change import layer_change, named_parts
from ..layers.shares import at_hand, holder_of, sharded


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
    for _, weight in named_parts(model):
        with at_hand(holder_of(weight).layer):
            change = layer_change(weight)
        if weight.magnitude:
            magnitudes.append(change.relative_magnitudes)
        if weight.rank:
            directions.append(change.directions)
    return Movement(_mean(magnitudes), _mean(directions))


@torch.no_grad()
def magnitude_moved(model: nn.Module) -> float | None:
    """Mean |Δm|/m alone, from m and the norms that are at hand; None where there is no m, or a part of it elsewhere (shards).

    Cost: a few vectors a layer, so that it can be asked for while a run goes on."""
    if sharded(model):
        return None
    parts = []
    for _, weight in named_parts(model):
        if weight.magnitude:
            w, m = weight.facts.w2.sqrt(), weight.m()
            parts.append(((m.to(w) - w).abs() / w)[~weight.facts.directionless])
    return _mean(parts)


def _mean(parts: list[torch.Tensor]) -> float | None:
    return torch.cat([p.cpu() for p in parts]).mean().item() if parts else None
