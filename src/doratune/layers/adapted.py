"""An adapted layer: a subclass, made on demand, of whatever class is adapted, plus one plain object with its settings.

    class AdaptedLinear(Adapted, nn.Linear)        forward(x) = compose(x, nn.Linear.forward(x), A, B, m)

Nothing is renamed or wrapped: the frozen weight stays `<module>.weight`, the new parameters are `<module>.lora_A`,
`.lora_B`, `.magnitude`. Undoing is giving the module its class back. `Adaptation` composes the three independent choices:
layer kind × base storage × direction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bases import accumulation_dtype
from ..directions.lora import LORA, NONE
from ..math import decomposition, norm
from ..math.cache import NormCache
from ..math.compose import Compose, ScaleInput, no_autocast


@dataclass
class Adaptation:
    """What one layer is adapted with. Picklable, copied with the module; never shared between layers."""

    kind: object
    rank: int  # 0: magnitude only
    scaling: float
    magnitude: bool
    axis: str = "output"
    full_gradient: bool = False
    dropout: float = 0.0
    cache: NormCache = field(default_factory=NormCache)
    epoch: int = 0
    calls: int = 0  # how often the adapted forward really ran
    _frozen: tuple | None = None

    @property
    def base(self):
        return self.kind.base

    @property
    def direction(self):
        return LORA if self.rank else NONE

    def frozen_facts(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """(w², rows without direction), from W once, and again only when W changed."""
        version = self.base.version(module)
        facts = self._frozen
        if facts is None or facts[0] != version:
            length = self.base.shape(module)[0 if self.axis == "output" else 1]
            dtype = accumulation_dtype(self.base.dtype(module))
            with torch.inference_mode(False), torch.no_grad(), no_autocast(self.base.device(module)):
                tiles = self.base.row_tiles(module)
                w2 = decomposition.squared_norms(tiles, length, self.axis, dtype, self.base.device(module))
                facts = version, w2, decomposition.directionless(w2.sqrt())
            self._frozen = facts
        return facts[1:]

    def changed(self) -> None:
        """Something may have changed A, B or W: recompute what was derived."""
        self.epoch += 1
        self.cache.clear()
        self._frozen = None


class LayerSite(NamedTuple):
    """A layer in one call: what the op asks (see `math.compose.Site`)."""

    module: nn.Module
    adaptation: Adaptation
    gradients: bool = False  # were gradients enabled where the layer was called?

    @property
    def base(self):
        return self.adaptation.base

    @property
    def scaling(self) -> float:
        return self.adaptation.scaling

    @property
    def full_gradient(self) -> bool:
        return self.adaptation.full_gradient

    @property
    def frozen(self) -> Tensor:
        return self.adaptation.frozen_facts(self.module)[1]

    def norm(self, A: Tensor | None, B: Tensor | None, dtype: torch.dtype, tokens: int) -> Tensor:
        """n in fp32, of A and B rounded to `dtype`; cached."""
        a = self.adaptation
        w2, _ = a.frozen_facts(self.module)
        if A is None:
            return a.cache.get((), (a.epoch, self.base.version(self.module)), 0, w2.sqrt)
        context = a.epoch, dtype, self.base.version(self.module)
        return a.cache.get((A, B), context, tokens, lambda: self.terms(A.to(dtype), B.to(dtype)).n, self.gradients)

    def terms(self, A: Tensor, B: Tensor) -> norm.Terms:
        """The norm's parts, uncached. A and B already in the dtype of the forward."""
        a = self.adaptation
        with torch.no_grad(), no_autocast(A.device):
            return norm.terms(a.base, self.module, A, B, a.scaling, a.frozen_facts(self.module)[0], a.axis)

    def redone(self, A: Tensor, B: Tensor) -> Tensor:
        return self.terms(A, B).redone


class Adapted:
    """Mixin in front of the layer's own class."""

    adaptation: Adaptation
    plain_class: type
    """The class that the module had before; set on each subclass."""

    def forward(self, *args, **kwargs):
        name = next((key for key in ("input", "x") if key in kwargs), None)
        x, args = (kwargs.pop(name), args) if not args and name else (args[0], args[1:])
        return _adapted_forward(self, super().forward, x, *args, **kwargs)

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

    def __reduce_ex__(self, protocol):
        state = self.__getstate__() if hasattr(self, "__getstate__") else None
        return _rebuild, (type(self).plain_class,), self.__dict__.copy() if state is None else state

    def extra_repr(self) -> str:
        a = self.adaptation
        parts = [super().extra_repr(), f"rank={a.rank}", f"scaling={a.scaling:g}"]
        return ", ".join(parts + ([f"magnitude per {a.axis}"] if a.magnitude else []))


@torch.compiler.disable
def _adapted_forward(module, base_forward, x, *args, **kwargs):
    a = module.adaptation
    a.calls += 1
    A, B = a.direction.factors(module)
    m, site = module.magnitude, LayerSite(module, a, torch.is_grad_enabled())
    if m is not None and a.axis == "input":
        x, m = ScaleInput.apply(x.reshape(-1, x.shape[-1]), A, B, m, site, compute_dtype(x)).view(x.shape), None
    out = base_forward(x, *args, **kwargs)
    if A is not None and a.dropout and module.training:
        x = F.dropout(x, a.dropout)
    if A is None and m is None:
        return out
    x_TI = x.reshape(-1, x.shape[-1]) if A is not None else None
    return Compose.apply(x_TI, out.reshape(-1, out.shape[-1]), A, B, m, module.bias, site).view(out.shape)


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
    w_before = a.frozen_facts(module)[0].sqrt() if a.magnitude and not module.weight.is_meta else None
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
        w = a.frozen_facts(module)[0].sqrt().to(m.dtype)
        m.data = torch.where(before["magnitude"][0].to(m.device) == w_before.to(m), w, m.data)
    return result


def restore_precision(module: nn.Module) -> None:
    """A, B, m that a load assigned in a low precision become fp32 again."""
    for name, p in own_parameters(module).items():
        if p.dtype.itemsize < 4:
            module._parameters[name] = nn.Parameter(p.detach().float(), requires_grad=p.requires_grad)
