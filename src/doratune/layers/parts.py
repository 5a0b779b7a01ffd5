"""A part of a layer seen as a linear layer of its own: one expert of a batched weight, or some rows of a packed one.

    expert e       W[e] (O, I), A[e], B[e], m[e]                      (§3.1, per expert)
    rows a:b       W[a:b], A, B[a:b], m[a:b]; which rows have no direction is decided in the whole

A part has what the maths asks of a layer: `weight`, the direction's tensors, `adaptation`, `training`. Norms, the op, merging and
`verify` then treat it as any linear layer. Parts are made anew for each use; what is derived from their tensors (norm, ready
factors, w²) stays in a `PartAdaptation`, which the layer's own adaptation holds. Cost: nothing for a part that is not used.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..bases.dense import DenseBase
from .site import Adaptation, FrozenFacts, LayerSite


class Views:
    """Views of parameters, each the same object while the parameter's memory stays: a norm's sources are known again by them."""

    def __init__(self):
        self.kept: dict[str, tuple[tuple, Tensor]] = {}

    def get(self, name: str, p: Tensor, index) -> Tensor:
        key = p.data_ptr(), p.dtype, p.device, p.shape
        if name not in self.kept or self.kept[name][0] != key:
            with torch.inference_mode(False):
                self.kept[name] = key, p.detach()[index]
        return self.kept[name][1]

    def __deepcopy__(self, memo):
        return Views()

    def __reduce__(self):
        return Views, ()


@dataclass
class PartAdaptation(Adaptation):
    """What one part is adapted with: the layer's choices, and caches of its own."""

    views: Views = field(default_factory=Views)

    @property
    def made(self) -> bool:
        """The factors of a call are slices without an identity: the norm is kept under `direction.sources` of the part."""
        return True

    def frozen_facts(self, module: Part) -> FrozenFacts:
        return module.facts(super().frozen_facts)


@dataclass
class WholeAdaptation(Adaptation):
    """What a layer with parts is adapted with."""

    parts: dict[object, PartAdaptation] = field(default_factory=dict)

    def part(self, key, kind) -> PartAdaptation:
        """The adaptation of one part, seen as a layer of this kind."""
        if key not in self.parts:
            names = (
                "direction",
                "rank",
                "scaling",
                "magnitude",
                "axis",
                "full_gradient",
                "relative",
                "dropout",
                "handle",
                "siblings",
            )
            choices = {name: getattr(self, name) for name in names}
            self.parts[key] = PartAdaptation(kind=kind, base=DenseBase(kind), **choices)
        return self.parts[key]

    def changed(self) -> None:
        super().changed()
        for part in self.parts.values():
            part.changed()


class Part:
    """A part of `layer`; subclasses say which."""

    def __init__(self, layer: nn.Module, adaptation: PartAdaptation):
        self.layer, self.adaptation = layer, adaptation

    def facts(self, own) -> FrozenFacts:
        """w² and the rows without direction; own: the function that reads them off this part's weight."""
        return own(self)

    def op_site(self, gradients: bool, count: bool = False) -> LayerSite:
        self.adaptation.calls += count
        return LayerSite(self, self.adaptation, gradients)

    @property
    def training(self) -> bool:
        return self.layer.training

    @property
    def scaling(self) -> float:
        return self.adaptation.scaling


class Rows(Part):
    """Rows of a packed weight. Its direction's tensors are the layer's: a caller slices the factors."""

    def __init__(self, layer: nn.Module, rows: slice, kind):
        super().__init__(layer, layer.adaptation.part((rows.start, rows.stop), kind))
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        return self.adaptation.views.get("weight", self.layer.adaptation.base.weight(self.layer), self.rows)

    def facts(self, own) -> FrozenFacts:
        w2, directionless, frozen = self.layer.adaptation.frozen_facts(self.layer)
        return FrozenFacts(w2[self.rows], directionless[self.rows], None if frozen is None else frozen[self.rows])

    def __getattr__(self, name: str):
        return getattr(self.layer, name)


class Indexed(Part):
    """Number `index` of a batch of matrices (E, O, I); `given` has tensors to take instead of views of the parameters."""

    def __init__(self, layer: nn.Module, index: int, kind, given: dict[str, Tensor] | None = None):
        super().__init__(layer, layer.adaptation.part(index, kind))
        self.index, self.given = index, given or {}

    @property
    def weight(self) -> Tensor:
        return self.layer.weight[self.index]

    @property
    def magnitude(self) -> Tensor | None:
        return self.magnitude_start * self.magnitude_delta.exp() if self.adaptation.relative else self.tensor("magnitude")

    @property
    def _parameters(self) -> dict[str, Tensor | None]:
        return {name: self.tensor(name) for name in self.layer._parameters}

    def tensor(self, name: str) -> Tensor | None:
        p = self.layer._parameters.get(name)
        if p is None or name in self.given:
            return self.given.get(name)
        return self.adaptation.views.get(name, p, self.index)

    def __getattr__(self, name: str) -> Tensor | None:
        if name == "layer" or name not in self.layer._parameters:
            raise AttributeError(name)
        return self.tensor(name)
