"""An adapted layer: a subclass, made on demand, of whatever class is adapted, plus one plain object with its settings.

    class AdaptedLinear(Adapted, nn.Linear)        forward(x) = the layer kind's, around nn.Linear.forward

Nothing is renamed or wrapped: the frozen weight stays `<module>.weight`, the new parameters are `<module>.lora_A`,
`.lora_B`, `.magnitude`. Undoing is giving the module its class back.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from ..bases import accumulation_dtype
from .kind import class_forwards
from .magnitude import MAGNITUDES
from .shares import gathered, is_share, put_value
from .weight import AdaptedWeight

MAGNITUDE = MAGNITUDES[False][0]


class Adapted:
    """Mixin in front of the layer's own class."""

    adapted: AdaptedWeight
    plain_class: type
    """The class that the module had before; set on each subclass."""

    def forward(self, *args, **kwargs):
        if not args:
            name = next((key for key in ("input", "x") if key in kwargs), None)
            args = (kwargs.pop(name),) if name else ()
        return (self.adapted.split or self.adapted.kind).forward(self, *args, **kwargs)

    def base_forward(self, *args, **kwargs):
        """The plain layer's own forward."""
        return super().forward(*args, **kwargs)

    @property
    def scaling(self) -> float:
        """s, the factor of B·A."""
        return self.adapted.scaling

    def _apply(self, fn, recurse=True):
        return keep_precision(self, lambda: super(Adapted, self)._apply(fn, recurse))

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        restore_precision(self)
        self.adapted.moved()

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.adapted.handle.bound():  # a shallow copy of a layer
            self.adapted = copy.deepcopy(self.adapted)
        self.adapted.belongs_to(self)

    def _replicate_for_data_parallel(self):
        """nn.DataParallel's copy for one device and one call: a weight of its own, over the copy's tensors."""
        replica = super()._replicate_for_data_parallel()
        replica.adapted = copy.deepcopy(self.adapted)
        replica.adapted.belongs_to(replica)
        return replica

    def __reduce_ex__(self, protocol):
        state = self.__getstate__() if hasattr(self, "__getstate__") else None
        return _rebuild, (type(self).plain_class, self.adapted.relative), self.__dict__.copy() if state is None else state

    def extra_repr(self) -> str:
        a = self.adapted
        parts = [super().extra_repr(), f"{a.direction.name} rank={a.rank}, scaling={a.scaling:g}"]
        return ", ".join([part for part in parts if part] + ([f"magnitude per {a.axis}"] if a.magnitude else []))


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, Adapted)


class RelativeMagnitude:
    """Further mixin for m = m₀·exp(δ): `magnitude_delta` is trained, `magnitude_start` holds m₀."""

    @property
    def magnitude(self) -> Tensor:
        return self.magnitude_start * self.magnitude_delta.exp()


def become(module: nn.Module, cls: type) -> None:
    """Give a module another class. What keeps the old class's forward on the module (`class_forwards`) gets the new one."""
    for put in list(class_forwards(module)):
        put(cls.forward.__get__(module))
    module.__class__ = cls


@cache
def adapted_class(cls: type, relative: bool = False) -> type:
    mixins = (RelativeMagnitude, Adapted) if relative else (Adapted,)
    return type(f"Adapted{cls.__name__}", (*mixins, cls), {"__module__": cls.__module__, "plain_class": cls})


def _rebuild(cls: type, relative: bool) -> nn.Module:
    adapted = adapted_class(cls, relative)
    return adapted.__new__(adapted)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters of an adapted module, by name."""
    return {name: p for name in module.adapted.names if (p := module._parameters.get(name)) is not None}


def keep_precision(module: nn.Module, apply):
    """Run `apply` (a move or a dtype change of the module) and keep A, B and m in fp32 (fp64 over an fp64 base).

    After a dtype change W has other values: magnitudes that had not moved from the start follow it, so that the start stays exact.
    """
    a, base = module.adapted, module.adapted.base
    before = {name: (p.data, None if p.grad is None else p.grad.data) for name, p in own_parameters(module).items()}
    dtype = base.dtype(module)
    known = a.magnitude and base.device(module).type != "meta"
    start = "magnitude_start" if a.relative else "magnitude"
    w_before = a.facts.w2.sqrt() if known else None
    result = apply()
    wide = accumulation_dtype(base.dtype(module))
    for name, p in own_parameters(module).items():
        data, grad = before[name]
        if p.dtype != wide:
            _give(p, data.to(p.device, wide))
            if grad is not None:
                p.grad = grad.to(p.device, wide)
    a.changed()
    low = before[MAGNITUDE][0].dtype if MAGNITUDE in before else wide
    if low.itemsize < wide.itemsize and base.device(module).type != "meta":
        start_again(module, low)
    if w_before is not None and base.dtype(module) != dtype and base.device(module).type != "meta":
        m = getattr(module, start)
        w = a.facts.w2.sqrt().to(m.dtype)
        m_before = gathered(before[start][0]).to(m.device)
        _replace(m, torch.where(m_before == w_before.to(m_before), w, gathered(m.data)))
    return result


@torch.no_grad()
def start_again(module: nn.Module, low: torch.dtype) -> bool:
    """Give magnitudes that are the norms of their rows, rounded to `low` by somebody, the norms themselves. Were all of them?"""
    m = module._parameters[MAGNITUDE]
    w, now = module.adapted.facts.w2.sqrt().to(m.dtype), gathered(m.data)
    starting = now == w.to(low).to(m.dtype)
    _replace(m, torch.where(starting, w, now))
    return bool(starting.all())


def _give(p: nn.Parameter, data: Tensor) -> None:
    """Give a parameter other data, of another dtype maybe. `data` of a share would leave its own numbers as they were."""
    if is_share(p):
        torch.utils.swap_tensors(p, nn.Parameter(data, requires_grad=p.requires_grad))
    else:
        p.data = data


def _replace(m: nn.Parameter, values: Tensor) -> None:
    """Give m other values; where this process has a part of it, those of that."""
    if is_share(m):
        put_value(m, values)
    else:
        m.data = values


def restore_precision(module: nn.Module) -> None:
    """A, B, m that a load assigned in a low precision become fp32 again."""
    for name, p in own_parameters(module).items():
        if p.dtype.itemsize < 4:
            module._parameters[name] = nn.Parameter(p.detach().float(), requires_grad=p.requires_grad)
