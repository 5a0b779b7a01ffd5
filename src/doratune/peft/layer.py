"""A layer of PEFT with a forward of ours: a subclass, made on demand, of the class that it has.

    one DoRA adapter active, not merged, not disabled     y from the adapted weight, as in every adapted layer
    dropout in training                                   y = W·(x − x̂) + DoRA(x̂),  x̂ = dropout(x): PEFT drops the input of the
                                                          base's correction too, W·x + (g − 1)·W·x̂ + g·s·B·A·x̂, which is the same
    all other calls                                       PEFT's own forward: mixed batches, several active adapters, merged and
                                                          disabled layers, arguments of other variants, parts with hooks

Nothing of PEFT's is renamed or replaced: parameters, their containers and every method but those below stay PEFT's. Cost: what
PEFT's own dispatch costs; with dropout one more product of the base, as in PEFT.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from ..bases import Base
from ..layers.shares import managed_module
from . import sources
from .merging import sound_variants, without_direction
from .weight import PeftRegistry, PeftWeight, weight_of_adapter


class LayerWeights:
    """The adapted weights of one PEFT layer, one an adapter; copies of the layer make their own."""

    def __init__(self, registry: PeftRegistry, base: Base, still: Tensor | None = None):
        self.registry, self.base = registry, base
        self.by_adapter: dict[str, PeftWeight] = {}
        self.still = still  # rows (columns) of W without a direction, while it is merged

    def __reduce__(self):
        return LayerWeights, (self.registry, self.base, self.still)

    def renew(self, module: nn.Module) -> None:
        """Make those of the adapters that the layer has now; what is current stays."""
        names = sources.dora_adapters(module)
        for name in [name for name in self.by_adapter if name not in names]:
            del self.by_adapter[name]
        for name in names:
            if name not in self.by_adapter or not self.by_adapter[name].is_current():
                self.by_adapter.pop(name, None)
                if (weight := weight_of_adapter(module, name, self.base, self.registry)) is not None:
                    self.by_adapter[name] = weight
        self.registry.modules.add(module)
        self.registry.forget()

    def of_call(self, module: nn.Module) -> PeftWeight | None:
        """The weight that a call of the layer has, or None where the call goes PEFT's way."""
        if module._disable_adapters or module.merged_adapters:
            return None
        active = module._active_adapter
        active = active if isinstance(active, str) else active[0] if len(active) == 1 else _only(module, active)
        weight = self.by_adapter.get(active)
        if weight is not None and not weight.is_current():
            if torch.compiler.is_compiling():
                return None
            self.renew(module)
            weight = self.by_adapter.get(active)
        # hooks of parts would run in PEFT's forward, and not in ours
        return None if weight is None or any(weight.own_hooks) or managed_module(weight.site.module) else weight


def _only(module: nn.Module, active: list[str]) -> str | None:
    """The one of the active adapters that this layer has, if it is one."""
    own = [name for name in active if name in module.lora_A or name in module.lora_embedding_A]
    return own[0] if len(own) == 1 else None


class Accelerated:
    """Mixin in front of the PEFT layer's own class."""

    layer_weights: LayerWeights
    plain_class: type
    """The class that the module had before; set on each subclass."""

    def forward(self, x, *args, **kwargs):
        weight = None if args or kwargs else self.layer_weights.of_call(self)
        if weight is None:
            return super().forward(x, *args, **kwargs)
        kind, site = weight.kind, weight.site
        hooks = any(weight.base_hooks) or "forward" in site.module.__dict__
        if not torch.compiler.is_compiling():
            weight.scale_by(weight.s)
            weight.own_product = weight.computes and not hooks
        dropout = self.lora_dropout[weight.adapter] if self.training and kind.linear_in_x else None
        dropping = dropout is not None and not isinstance(dropout, nn.Identity)
        if hooks and (dropping or not kind.linear_in_x):  # they would be called with other inputs, or not at all
            return super().forward(x)
        return dropped(self, weight, x, dropout) if dropping else kind.forward(site, x)

    def update_layer(self, *args, **kwargs):
        """An adapter is added, or made anew."""
        result = super().update_layer(*args, **kwargs)
        self.layer_weights.renew(self)
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.layer_weights.renew(self)

    def merge(self, *args, **kwargs) -> None:
        weights = self.layer_weights
        if not self.merged:
            weights.still = without_direction(next(iter(weights.by_adapter.values()), None))
        with sound_variants(self, weights.still):
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        with sound_variants(self, self.layer_weights.still):
            super().unmerge()

    def __setstate__(self, state):
        super().__setstate__(state)
        before = self.layer_weights
        self.layer_weights = LayerWeights(before.registry, before.base, before.still)
        self.layer_weights.renew(self)

    def __reduce_ex__(self, protocol):
        state = self.__getstate__() if hasattr(self, "__getstate__") else None
        return _rebuild, (type(self).plain_class,), self.__dict__.copy() if state is None else state

    def _replicate_for_data_parallel(self):
        """nn.DataParallel's copy for one device and one call goes PEFT's way."""
        replica = super()._replicate_for_data_parallel()
        replica.__class__ = type(self).plain_class
        return replica


def dropped(module: nn.Module, weight: PeftWeight, x: Tensor, dropout: nn.Module) -> Tensor:
    """W·(x − x̂) + DoRA(x̂), with PEFT's x̂ for the same state of the random numbers."""
    base = module.base_layer
    owner, name, *_ = weight.places["lora_A"]
    x_dropped = dropout(module._cast_input_dtype(x, owner._parameters[name].dtype)).to(x.dtype)
    y = weight.kind.forward(weight.site, x_dropped)
    if weight.computes:
        return y + nn.functional.linear(x - x_dropped, base.weight)
    rest, bias = base(x - x_dropped), getattr(base, weight.kind.bias_name, None)
    if bias is not None:  # which y has already
        rest = rest - bias.to(rest.dtype).view(-1, *[1] * len(getattr(base, "kernel_size", ())))
    return y + rest


@cache
def accelerated_class(cls: type) -> type:
    return type(f"Accelerated{cls.__name__}", (Accelerated, cls), {"__module__": cls.__module__, "plain_class": cls})


def _rebuild(cls: type) -> nn.Module:
    accelerated = accelerated_class(cls)
    return accelerated.__new__(accelerated)
