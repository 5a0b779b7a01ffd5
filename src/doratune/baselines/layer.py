"""A module that a baseline was added to: a subclass, made on demand, of the module's own class.

The new parameters are registered on the module itself, in fp32 (fp64 over an fp64 base), and stay so when the model changes its
dtype. Undoing is giving the module its class back.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from ..layers.adapted import become
from .config import BaselineConfig

SETTINGS = "doratune_baseline"
"""Attribute of a module with a baseline: its BaselineConfig."""


class BaselineLayer:
    """Mixin in front of the module's own class."""

    names: tuple[str, ...] = ()
    """The parameters that this baseline adds."""
    plain_class: type
    mixin: type

    def _apply(self, fn, recurse=True):
        before = {name: (p.data, None if p.grad is None else p.grad.data) for name, p in own_parameters(self).items()}
        result = super()._apply(fn, recurse)
        for name, p in own_parameters(self).items():
            if p.dtype.itemsize < 4:
                data, grad = before[name]
                p.data = data.to(p.device)
                p.grad = None if grad is None else grad.to(p.device)
        return result

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        for name, p in own_parameters(self).items():
            if p.dtype.itemsize < 4:  # assigned in a low precision
                self._parameters[name] = nn.Parameter(p.detach().float(), requires_grad=p.requires_grad)

    def __reduce_ex__(self, protocol):
        return _rebuild, (type(self).mixin, type(self).plain_class), self.__dict__.copy()


@cache
def class_with(mixin: type, cls: type) -> type:
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {"__module__": cls.__module__, "plain_class": cls, "mixin": mixin})


def _rebuild(mixin: type, cls: type) -> nn.Module:
    with_baseline = class_with(mixin, cls)
    return with_baseline.__new__(with_baseline)


def put_on(module: nn.Module, mixin: type, config: BaselineConfig, values: dict[str, torch.Tensor], trainable: bool) -> None:
    """Register the parameters and give the module its new class."""
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=trainable))
    setattr(module, SETTINGS, config)
    become(module, class_with(mixin, type(module)))


def take_off(module: nn.Module) -> None:
    """Make it the plain module again."""
    for name in type(module).names:
        del module._parameters[name]
    delattr(module, SETTINGS)
    become(module, type(module).plain_class)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The baseline's parameters of a module, by name."""
    return {name: p for name in type(module).names if (p := module._parameters.get(name)) is not None}
