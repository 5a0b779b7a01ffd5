"""An adapted weight whose A, B and m are the parameters of one adapter of a PEFT layer, whose W is that of its base layer.

The maths, the factors and their preparation are those of every adapted weight (`layers/weight.py`); what differs is where tensors
are, and that others may change s between two calls (`set_scale`, `scale_layer`). Cost: a few lookups a call.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..bases import Base, accumulation_dtype
from ..directions.lora import LORA
from ..layers.frozen import stand_in
from ..layers.registry import Registry
from ..layers.shares import managed_module
from ..layers.weight import AdaptedWeight
from . import sources
from .sources import Place


class PeftRegistry(Registry):
    """The weights of a model of PEFT, and the layers that they are of."""

    def __init__(self):
        super().__init__()
        self.modules = weakref.WeakSet()
        self.overwritten = False
        self.size = 0

    def __deepcopy__(self, memo):
        return self._like(self.overwritten)

    def __reduce__(self):
        return PeftRegistry._like, (self.overwritten,)

    @staticmethod
    def _like(overwritten: bool) -> PeftRegistry:
        registry = PeftRegistry()
        registry.overwritten = overwritten
        return registry

    def looked_at(self) -> int:
        """How many layers have weights that are looked at: those that lie whole in their modules."""
        return sum(not managed_module(module.base_layer) for module in self.modules)

    def forget(self) -> None:
        """Some layers or adapters are gone: nothing of theirs is held any more."""
        self.watched.clear()
        self.prints.clear()
        self.size = self.looked_at()

    def find_shares(self, model, running: bool = False) -> None:
        """Layers whose weights are whole only while they run go PEFT's way."""


class BaseLayer:
    """The base layer of a PEFT layer, as layer kinds ask for an adapted layer."""

    def __init__(self, weight: PeftWeight, module: nn.Module):
        self.adapted, self.module, self._parameters = weight, module, module._parameters

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    def base_forward(self, *args, **kwargs) -> Tensor:
        return self.module(*args, **kwargs)


@dataclass(eq=False)
class PeftWeight(AdaptedWeight):
    """What one adapter of a PEFT layer is to the maths."""

    adapter: str = "default"
    places: dict[str, Place] = field(default_factory=dict)
    computes: bool = False  # is the base's forward a plain product, which the op may compute?
    site: BaseLayer | None = None
    expected: tuple = ()  # (where a module is, its key there, the module) of the base layer and of those that hold A, B and m
    own_hooks: tuple = ()  # the hooks of those that hold A, B and m
    base_hooks: tuple = ()

    @property
    def layer(self) -> nn.Module | None:
        return None if self._layer() is None else self.site.module

    @property
    def attached(self) -> bool:
        module = self._layer()
        known = module is not None and module.layer_weights.by_adapter.get(self.adapter) is self
        return known and not managed_module(self.site.module)

    @property
    def s(self) -> float:
        return float(self._layer().scaling[self.adapter])

    def belongs_to(self, layer) -> None:
        """layer: the PEFT layer."""
        base = layer.base_layer
        self._layer = weakref.ref(layer)
        self.computes = self.kind.own_product(self, type(base))
        self.own_product = self.computes
        self.site = BaseLayer(self, base)
        self.expected = ((layer._modules, "base_layer", base), *sources.held(layer, self.adapter, self.places))
        self.own_hooks = tuple(hooks for place in self.places.values() for hooks in sources.hooks(place.owner))
        self.base_hooks = sources.hooks(base)
        self.handle.bind(self)
        self.registry.add(self)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple([self._tensor(name) for name in self.names])

    def parameters(self, names: tuple[str, ...]) -> tuple[Tensor | None, ...]:
        return tuple(self._tensor(name) for name in names)

    def _tensor(self, name: str) -> Tensor | None:
        place = self.places.get(name)
        if place is None:
            return getattr(self.layer, name, None)
        p = place.owner._parameters[place.name]
        return p if place.seen is None else place.seen(p)

    def m(self, tensors: tuple[Tensor, ...] | None = None) -> Tensor:
        m = super().m(tensors)
        wide = accumulation_dtype(self.dtype)
        return m if m.dtype == wide else m.to(wide)

    def slots(self) -> list[tuple]:
        own = [(place.owner._parameters, place.name) for name, place in self.places.items() if name in self.watched_names]
        base, bias = self.layer._parameters, self.kind.bias_name
        return [*own, (base, bias)] if bias in self.watched_names and bias in base else own

    def standing_in(self, tensors, W: Tensor | None):
        own = {}
        for name, t in zip(self.names, tensors) if tensors else ():
            place, mine = self.places[name], self._tensor(name)
            if mine.data_ptr() != t.data_ptr():
                own[place.owner, place.name] = t if place.back is None else place.back(t, place.owner._parameters[place.name])
        with_W = super().standing_in((), W)
        return _both(with_W, stand_in(own)) if own else with_W

    def is_current(self) -> bool:
        """Are the modules that it knows still those of the adapter, with factors of the same rank?"""
        for holder, key, module in self.expected:
            if holder.get(key) is not module:
                return False
        owner, name, seen, _ = self.places["lora_A"]
        A = owner._parameters.get(name)
        return A is not None and A.shape[0 if seen is not sources.transposed else 1] == self.rank


@contextlib.contextmanager
def _both(first, second):
    with first, second:
        yield


def weight_of_adapter(module: nn.Module, adapter: str, base: Base, registry: PeftRegistry) -> PeftWeight | None:
    """What this adapter of a PEFT layer is to the maths, in the registry; None where its tensors are not plain parameters.

    base: the storage of the base layer's weight."""
    places = sources.places(module, adapter, base.kind)
    if places is None:
        return None
    A, scaling = places["lora_A"], module.scaling[adapter]
    weight = PeftWeight(
        kind=base.kind,
        base=base,
        direction=LORA,
        rank=A.owner._parameters[A.name].shape[0 if A.seen is not sources.transposed else 1],
        scaling=float(scaling),
        magnitude=True,
        axis=base.kind.peft_axis,
        registry=registry,
        overwritten=registry.overwritten,
        adapter=adapter,
        places=places,
    )
    weight.belongs_to(module)
    return weight
