"""An adapted layer: a subclass, made on demand, of whatever class is adapted, plus one plain object with its settings.

    class AdaptedLinear(Adapted, nn.Linear)        forward(x) = compose(x, nn.Linear.forward(x), A, B, m)

Nothing is renamed or wrapped: the frozen weight stays `<module>.weight`, the new parameters are `<module>.lora_A`,
`.lora_B`, `.magnitude`. Undoing is giving the module its class back.

One forward, three ways through the same maths: with gradients `math/autograd.py`, without them
`infer` with ready factors, under torch.compile the ops of `math/op.py`.
"""

from __future__ import annotations

import copy
import math
from functools import cache

import torch
from torch import Tensor, nn

from ..bases import accumulation_dtype
from ..math import op
from ..math.autograd import Compose, ComposeLinear, ScaleInput
from ..math.compose import infer
from .site import Adaptation, LayerSite


class Adapted:
    """Mixin in front of the layer's own class."""

    adaptation: Adaptation
    plain_class: type
    """The class that the module had before; set on each subclass."""

    def forward(self, *args, **kwargs):
        name = next((key for key in ("input", "x") if key in kwargs), None)
        x, args = (kwargs.pop(name), args) if not args and name else (args[0], args[1:])
        return _adapted_forward(self, super().forward, x, *args, **kwargs)

    def op_site(self, gradients: bool, count: bool = False) -> LayerSite:
        """This layer as the op sees it; count: this call is a forward."""
        self.adaptation.calls += count
        return LayerSite(self, self.adaptation, gradients)

    @property
    def scaling(self) -> float:
        """s, the factor of B·A."""
        return self.adaptation.scaling

    def _apply(self, fn, recurse=True):
        return keep_precision(self, lambda: super(Adapted, self)._apply(fn, recurse))

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        restore_precision(self)
        self.adaptation.changed()

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.adaptation.handle.bound():  # a shallow copy of a layer
            self.adaptation = copy.deepcopy(self.adaptation)
        self.adaptation.belongs_to(self)

    def __reduce_ex__(self, protocol):
        state = self.__getstate__() if hasattr(self, "__getstate__") else None
        return _rebuild, (type(self).plain_class,), self.__dict__.copy() if state is None else state

    def extra_repr(self) -> str:
        a = self.adaptation
        parts = [super().extra_repr(), f"rank={a.rank}", f"scaling={a.scaling:g}"]
        return ", ".join(parts + ([f"magnitude per {a.axis}"] if a.magnitude else []))


def _adapted_forward(module, base_forward, x, *args, **kwargs):
    a, m = module.adaptation, module.magnitude
    A, B = a.direction.factors(module)
    traced, gradients = torch.compiler.is_compiling(), torch.is_grad_enabled()
    site = None if traced else module.op_site(gradients, count=True)
    if m is not None and a.axis == "input":
        x, m = _scaled_input(module, site, x, A, B, m, gradients), None
    if gradients and not traced and A is not None and not args and not kwargs:
        W = a.kind.own_weight(module)
        if W is not None and W.dtype == x.dtype and not W.requires_grad and not torch.is_autocast_enabled(x.device.type):
            x_TI = flat(x)
            y = ComposeLinear.apply(x_TI, W, A, B, m, module.bias, *_dropout(module, x_TI), site)
            return y.view(*x.shape[:-1], len(W))
    out = base_forward(x, *args, **kwargs)
    if A is None and m is None:
        return out
    x_TI, out_TO = flat(x) if A is not None else None, flat(out)
    mask, keep = _dropout(module, x_TI)
    if traced:
        y = _traced(a, x_TI, out_TO, A, B, m, module.bias, mask, keep, gradients)
    elif gradients or mask is not None or torch.autograd.forward_ad._current_level >= 0:  # forward mode raises there
        y = Compose.apply(x_TI, out_TO, A, B, m, module.bias, mask, keep, site)
    else:
        y = infer(site, x_TI, out_TO, A, B, m, module.bias)
    return y.view(out.shape)


def _dropout(module, x_TI: Tensor | None) -> tuple[Tensor | None, float]:
    """(which inputs of the low-rank branch are kept, or None for all; the share that is)."""
    p = module.adaptation.dropout
    if not p or not module.training or x_TI is None:
        return None, 1.0
    return torch.empty_like(x_TI, dtype=torch.bool).bernoulli_(1.0 - p), 1.0 - p


def _scaled_input(module, site, x, A, B, m, gradients: bool) -> Tensor:
    """x̃ of the input axis."""
    x_TI, dtype = flat(x), compute_dtype(x)
    if site is None:
        return op.scaled_input(x_TI, A, B, m, dtype, module.adaptation.handle.tensor, gradients)[0].view(x.shape)
    return ScaleInput.apply(x_TI, A, B, m, site, dtype).view(x.shape)


def _traced(a: Adaptation, x_TI, out_TO, A, B, m, bias, mask, keep: float, gradients: bool) -> Tensor:
    """What torch.compile sees: the opaque op, or for LoRA plain products that it can fuse."""
    if m is not None:
        return op.compose(x_TI, out_TO, A, B, m, bias, mask, keep, a.handle.tensor, gradients)[0]
    dtype = out_TO.dtype
    with torch.autocast(out_TO.device.type, enabled=False):
        x_TI = x_TI.to(dtype) if mask is None else x_TI.to(dtype) * mask
        return out_TO + (x_TI @ A.to(dtype).T) @ (B.to(dtype) * (a.scaling / keep)).T


def flat(x: Tensor) -> Tensor:
    """(T, I), also where a size is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the layer will compute: autocast's, or the input's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


@cache
def adapted_class(cls: type) -> type:
    return type(f"Adapted{cls.__name__}", (Adapted, cls), {"__module__": cls.__module__, "plain_class": cls})


def _rebuild(cls: type) -> nn.Module:
    adapted = adapted_class(cls)
    return adapted.__new__(adapted)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters of an adapted module, by name."""
    names = ("lora_A", "lora_B", "magnitude")
    return {name: p for name in names if (p := module._parameters.get(name)) is not None}


def keep_precision(module: nn.Module, apply):
    """Run `apply` (a move or a dtype change of the module) and keep A, B and m in fp32 (fp64 over an fp64 base).

    After a dtype change W has other values: magnitudes that had not moved from w follow it, so that the start stays exact.
    """
    before = {name: (p.data, None if p.grad is None else p.grad.data) for name, p in own_parameters(module).items()}
    a, dtype = module.adaptation, module.weight.dtype
    w_before = a.frozen_facts(module).w2.sqrt() if a.magnitude and not module.weight.is_meta else None
    result = apply()
    for name, p in own_parameters(module).items():
        data, grad = before[name]
        wide = accumulation_dtype(module.weight.dtype)
        if p.dtype != wide:
            p.data = data.to(p.device, wide)
            if grad is not None:
                p.grad = grad.to(p.device, wide)
    a.changed()
    if w_before is not None and module.weight.dtype != dtype and not module.weight.is_meta:
        m = module.magnitude
        w = a.frozen_facts(module).w2.sqrt().to(m.dtype)
        m.data = torch.where(before["magnitude"][0].to(m.device) == w_before.to(m), w, m.data)
    return result


def restore_precision(module: nn.Module) -> None:
    """A, B, m that a load assigned in a low precision become fp32 again."""
    for name, p in own_parameters(module).items():
        if p.dtype.itemsize < 4:
            module._parameters[name] = nn.Parameter(p.detach().float(), requires_grad=p.requires_grad)
