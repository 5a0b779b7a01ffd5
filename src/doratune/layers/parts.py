"""One expert of a batched weight, seen as a linear layer of its own.

    expert e       W[e] (O, I), A[e], B[e], m[e]                      (§3.1, per expert)

An expert has what the maths asks of a layer; norms, calls, merging and `verify` treat it as any linear layer. `Expert` is made anew
for each use; what is derived from its tensors stays in its `PartWeight`, which the weight of the whole holds. Cost: nothing for an
expert that is not used.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..bases.dense import DenseBase
from .frozen import FrozenFacts
from .weight import AdaptedWeight


class Expert:
    """Number `index` of a batch of matrices (E, O, I)."""

    def __init__(self, batch: nn.Module, index: int):
        self.batch, self.index = batch, index

    @property
    def weight(self) -> Tensor:
        return self.batch.weight[self.index]

    @property
    def training(self) -> bool:
        return self.batch.training

    @property
    def _parameters(self) -> dict[str, Tensor | None]:
        own = self.batch._parameters.items()
        return {name: None if p is None else p.detach()[self.index] for name, p in own}


@dataclass(eq=False)
class PartWeight(AdaptedWeight):
    """What one expert is adapted with: the whole's choices."""

    whole: object = None
    index: int = 0

    @property
    def layer(self) -> Expert | None:
        batch = None if self.whole is None else self.whole.layer
        return None if batch is None else Expert(batch, self.index)

    def standing_in(self, tensors, W: Tensor | None):
        """Experts run the eager loop of their module: nothing stands in for them."""
        return contextlib.nullcontext()

    def slots(self) -> list[tuple]:
        own = self.whole.layer._parameters  # of all experts: their slices have no place of their own
        return [self.whole.own_slot(own, name) for name in self.names]

    def frozen_slot(self) -> tuple | None:
        batch = self.whole.layer
        return self.whole.own_slot(self.whole.kind.home(batch)._parameters, batch.part) if self.magnitude else None

    def stored(self) -> Tensor | None:
        return self.whole.stored()

    def share(self) -> object | None:
        return self.whole.share()

    def at_hand(self) -> bool:
        return self.whole.at_hand()

    @property
    def attached(self) -> bool:
        return self.whole is not None and self.whole.attached

    def parameters(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        own = self.whole.layer._parameters  # a bias is known to each call only
        return tuple(own[name].detach()[self.index] if own.get(name) is not None else None for name in names)


@dataclass(eq=False)
class BatchWeight(AdaptedWeight):
    """What a batched weight (E, O, I) is adapted with: its experts are the parts."""

    parts: dict[int, PartWeight] = field(default_factory=dict)

    def part(self, index: int) -> PartWeight:
        if index not in self.parts:
            names = (
                "direction",
                "rank",
                "scaling",
                "magnitude",
                "axis",
                "full_gradient",
                "relative",
                "dropout",
                "registry",
                "handle",
            )
            choices = {name: getattr(self, name) for name in names}
            kind = self.kind.expert_kind
            self.parts[index] = PartWeight(kind=kind, base=DenseBase(kind), whole=self, index=index, **choices)
            self.registry.add(self.parts[index])
        return self.parts[index]

    def belongs_to(self, layer) -> None:
        super().belongs_to(layer)
        for part in self.parts.values():
            part.registry = self.registry
            self.registry.add(part)

    def matrices(self) -> list[PartWeight]:
        return [self.part(index) for index in range(len(self.layer.weight))]

    def create(self, layer, seed: int, dtype: torch.dtype, device) -> None:
        """The direction's parameters, made for each expert and stacked."""
        each, (count, *shape) = [], self.base.shape(layer)
        for index in range(count):
            each.append(nn.Module())
            self.direction.create(each[-1], tuple(shape), self.rank, seed + index, dtype, device)
        for name in each[0]._parameters:
            experts = [one._parameters[name] for one in each]
            layer.register_parameter(name, None if experts[0] is None else nn.Parameter(torch.stack(experts).detach()))

    def low_rank(self, tensors=None) -> tuple[Tensor | None, Tensor | None]:
        """A (E, K, I), B (E, O, K)."""
        own = self.parameters(self.direction.names) if tensors is None else tensors[: len(self.direction.names)]
        shape = self.shape[-2:]
        factors = [self.direction.factors(one, shape) for one in zip(*own, strict=True)] or [(None, None)]
        return tuple(None if same[0] is None else torch.stack(same) for same in zip(*factors, strict=True))

    @property
    def facts(self) -> FrozenFacts:
        w2, directionless, _ = zip(*(part.facts for part in self.matrices()), strict=True)
        some = torch.stack(directionless)
        return FrozenFacts(torch.stack(w2), some, some if not some.is_meta and bool(some.any()) else None)

    def watched(self) -> list[Tensor]:
        """Its experts are watched one by one."""
        return []

    def changed(self) -> None:
        super().changed()
        for part in self.parts.values():
            part.changed()
