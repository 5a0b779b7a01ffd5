"""An adapted weight: layer kind × base × direction, its settings, and one place that decides how a call runs.

    ready       the factors of a call (`math/dora.py`), prepared anew when something changed (`prepared.py`)
    compose     y from x and the base's output, or from x and W: three ways through the same maths,
                eager with gradients (`math/autograd.py`), without (`math/dora.py` itself), traced (`math/compiled.py`)
    rescale     y from an output that holds the low-rank part already (convolutions, embeddings, the input axis' x̃)

A layer has its weight as `layer.adapted`; single experts have weights of their own (`parts.py`).

Cost: a call of an eager layer asks for its parameters' addresses and versions, nothing else.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..bases import Base
from ..directions import Direction
from ..math import compiled, dora
from ..math.autograd import Call, Composed, flat, grad_enabled, laid_out_as, modes, no_autocast
from ..math.dora import Factors
from .fingerprint import identity, tensor_in
from .frozen import FrozenWeight
from .magnitude import MAGNITUDES
from .registry import LIGHT_TOKENS, Registry
from .shares import whole


@dataclass(eq=False)
class AdaptedWeight(FrozenWeight):
    """What one weight is adapted with. Picklable, copied with its layer, never shared between layers."""

    kind: object
    base: Base
    direction: Direction
    rank: int  # 0: magnitude only
    scaling: float
    magnitude: bool
    axis: str = "output"
    full_gradient: bool = False
    relative: bool = False  # m = m₀·exp(δ)
    dropout: float = 0.0
    registry: Registry = field(default_factory=Registry)
    handle: compiled.Handle = field(default_factory=compiled.Handle)
    overwritten: bool = False  # by kernels that autograd does not see: the base's output is kept, not y
    keep_product: bool = False  # A is constant, so U = W·Aᵀ may be kept
    base_norms: object = None  # what tells its base again, of some layers (adapter/base_norms.py)
    calls: int = 0  # how often the adapted forward really ran
    preparations: int = 0  # how often its factors were prepared
    factors: Factors | None = None
    asked: bool = False  # since the last preparation
    own_product: bool = False  # the op may compute the base's product
    plain: bool = False  # A, B and m are the parameters themselves, and the norm is a constant to the backward
    names: tuple[str, ...] = ()  # of its parameters: the direction's, then those behind m
    watched_names: tuple[str, ...] = ()  # of the layer's tensors that factors are made of, besides W
    shares: dict = field(default_factory=dict)  # name → where a tensor's own numbers are, if copies of it come and go (`shares.py`)
    settled: bool = False  # have calls brought those as the norm needs them?
    _facts: tuple | None = None
    _product: tuple | None = None
    _likeness: tuple | None = None
    _layer: object = None

    def __post_init__(self):
        self.plain = self.direction.plain and not self.relative and not self.full_gradient
        self.names = (*self.direction.names, *(MAGNITUDES[self.relative] if self.magnitude else ()))
        if self.kind.prepares(self):
            self.watched_names = (*self.names, *((self.kind.bias_name,) if self.magnitude else ()))

    @property
    def layer(self):
        return self._layer()

    @property
    def attached(self) -> bool:
        """Is it what its layer is adapted with now?"""
        layer = self.layer
        return layer is not None and vars(layer).get("adapted") is self

    def belongs_to(self, layer) -> None:
        """Make the layer known to the ops and to the others of its attachment."""
        self._layer = weakref.ref(layer)
        self.own_product = self.kind.own_product(self, getattr(type(layer), "plain_class", type(layer)))
        self.shares = self.split.numbers(layer) if self.split and not self.shares else self.shares
        self.handle.bind(self)
        self.registry.add(self)

    def __getstate__(self):
        state = self.__dict__.copy()
        derived = ("factors", "_facts", "_product", "_likeness", "_layer")
        return state | dict.fromkeys(derived) | {"asked": False, "preparations": 0, "shares": {}, "settled": False}

    def tensors(self) -> tuple[Tensor, ...]:
        """Its parameters, in the order of `names`."""
        return self.parameters(self.names)

    def parameters(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        layer = self.layer
        own = layer._parameters
        return tuple(own[name] if name in own else getattr(layer, name, None) for name in names)

    def matrices(self) -> list:
        """The weights with one matrix each that this is made of: itself, or its experts."""
        return [self]

    def create(self, layer, seed: int, dtype: torch.dtype, device) -> None:
        """Register the direction's parameters with their first values."""
        self.direction.create(layer, self.base.shape(layer), self.rank, seed, dtype, device)

    def low_rank(self, tensors: tuple[Tensor, ...] | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(A (K, I), B (O, K)) of ΔV = s·B·A, differentiable in what is trained."""
        count = len(self.direction.tensors)
        own = self.parameters(self.names[:count]) if tensors is None else tensors[:count]
        return own if self.direction.plain and self.rank else self.direction.factors(own, self.shape)

    def m(self, tensors: tuple[Tensor, ...] | None = None) -> Tensor | None:
        """m (O,) or (I,), differentiable; None without a magnitude."""
        if not self.magnitude:
            return None
        tensors = self.tensors() if tensors is None else tensors
        return tensors[-1] * tensors[-2].exp() if self.relative else tensors[-1]

    def n(self, dtype: torch.dtype | None = None) -> Tensor:
        """|W + s·B·A| (O,) or (I,) as calls in `dtype` (default: W's) use it."""
        f = self.ready(dtype or self.dtype)
        return (f if f.gain is None else f.gain).n

    def pull_back(self, tensors: tuple[Tensor, ...], dA, dB, dm, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of `tensors` from those of A, B and m."""
        count = len(self.direction.tensors)
        if not any(needed[:count]) or (dA is None and dB is None):
            grads = (None,) * count
        elif self.direction.plain:
            grads = dA, dB
        else:
            grads = self.direction.pull_back(tensors[:count], self.shape, dA, dB, needed[:count])
        if not self.magnitude:
            return grads
        if self.relative:
            return *grads, None if dm is None or not needed[-2] else dm * self.m(tensors), None
        return *grads, dm if needed[-1] else None

    def changed(self) -> None:
        """Something may have changed A, B or W: everything that was derived is made anew."""
        self.factors = self._facts = self._product = self._likeness = None

    def moved(self) -> None:
        """Its tensors may lie elsewhere by now; where is found out at the model's next forward."""
        self.changed()
        self.shares, self.settled = self.shares if self.split else {}, False
        self.registry.search.begin()

    def at_hand(self) -> bool:
        """Are its tensors whole now?"""
        return all(t is None or whole(t) for t in (*self.layer._parameters.values(), self.stored()))

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias (O,), which is never scaled."""
        return getattr(self.layer, self.kind.bias_name, None)

    def watched(self) -> list[Tensor]:
        """Every tensor besides W that factors are made of."""
        return [t for t in self.parameters(self.watched_names) if t is not None]

    def slots(self) -> list[tuple]:
        """Where those are: (the dict or the module that holds one, its name)."""
        layer = self.layer
        own = layer._parameters
        places = [(own if name in own else layer, name) for name in self.watched_names]
        return [self.own_slot(*place) for place in places]

    def own_slot(self, holder, name: str) -> tuple:
        """Of a tensor of which copies come and go, where its own numbers are."""
        share = self.shares.get(name) if self.shares else None
        return (holder, name) if share is None else (share, "local")

    def frozen_slot(self) -> tuple | None:
        """Where W is, if it is one plain tensor that factors are made of."""
        if not self.base.writable or not self.magnitude or not self.watched_names:
            return None
        home, name = self.kind.home(self.layer), self.kind.weight_name
        return self.own_slot(home._parameters if name in home._parameters else home, name)

    def stamps(self) -> list[tuple]:
        """(holder, name, address, version) of everything that factors are made of."""
        slots = [*self.slots(), *([slot] if (slot := self.frozen_slot()) else [])]
        return [(*slot, *identity(tensor_in(slot))) for slot in slots]

    def storage(self) -> tuple | None:
        """What else tells that W is as it was, where it is no plain tensor, or a part of one."""
        return self.version() if self.magnitude and not self.base.writable else self.split and self.shape

    def is_as(self, f: Factors) -> bool:
        """Is everything where it was when these factors were prepared, in the same version?"""
        for holder, name, address, version in f.stamps:
            t = holder[name] if type(holder) is dict else getattr(holder, name, None)
            if t is None or t.is_inference():
                if identity(t) != (address, version):
                    return False
            elif t.data_ptr() != address or t._version != version:
                return False
        return f.storage is None or f.storage == self.storage()

    def ready(self, low: torch.dtype, light: bool = False, again: bool = False) -> Factors:
        """The factors of calls in this compute dtype. light: few tokens without gradients, for which a light look is enough; again:
        for the backward of a call, which was looked after."""
        registry, f = self.registry, self.factors
        generation = registry.generation if again else registry.current(self, light)
        self.asked = True
        if f is not None and f.generation == generation and f.low is low and self.is_as(f):
            return f
        return registry.prepare(self, low)

    def compose(self, x: Tensor, base: Tensor, bias: Tensor | None, own: bool = False, which=None, live=None) -> Tensor:
        """y = out + (g − 1) ⊙ (out − bias) + x·Aᵀ·(s·g ⊙ B)ᵀ, in the shape of the base's output.

        base: W (O, I) if `own`, whose product is then made here, else the base's output. which: only these rows of a packed weight,
        of which W and bias are slices. live: the parameters as autograd sees them, where they are not the layer's own."""
        if torch.compiler.is_compiling():
            return compiled.compose(self, x, base, bias, *(self._mask(x) if self.dropout else (None, 1.0)))
        return self.composed(x, base, bias, own, which, live)

    def composed(self, x: Tensor, base: Tensor, bias: Tensor | None, own: bool = False, which=None, live=None) -> Tensor:
        """`compose` in eager mode."""
        mask, keep = self._mask(x) if self.dropout else (None, 1.0)
        gradients = grad_enabled() or mask is not None or forward_ad._current_level >= 0
        f = self.ready(base.dtype, not gradients and x.numel() < LIGHT_TOKENS * x.shape[-1])
        if which is not None:
            f = f.rows(which)
        if bias is not None and f.bias is None and f.g is not None:
            f = f.with_bias(bias)
        if not gradients:
            return self._infer(f, x, base, bias, own)
        call = f.call if own and mask is None and f.call is not None else Call(self, f, own, mask, keep, which)
        f.call = call if own and mask is None else None
        y = Composed.apply(x, base, bias, call, *(self.tensors() if live is None else live))
        return y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def _infer(f: Factors, x: Tensor, base: Tensor, bias: Tensor | None, own: bool) -> Tensor:
        """`compose` without anything kept."""
        if not own:
            with no_autocast(base.device):
                return dora.forward(f, flat(x), flat(base))[0].view(base.shape)
        out = nn.functional.linear(x, base, bias)
        fresh = f.passes is None and not modes() and out.is_contiguous()
        y, _ = dora.forward(f, flat(x), flat(out), fresh=fresh)
        return out if fresh else y.view(out.shape)

    def rescale(self, out: Tensor, bias: Tensor | None = None, dim: int = -1, x: Tensor | None = None) -> Tensor:
        """out + (g − 1) ⊙ (out − bias), g along dimension `dim` of an output that holds the low-rank part already.

        x: the layer's input, for rows that their bias drowns."""
        last = dim in (-1, out.dim() - 1)
        if last or not out.is_contiguous():
            moved = out if last else out.movedim(dim, -1)
            y = self._rescaled(flat(moved), bias, x, out.dtype).view(moved.shape)
            return y if last else y.movedim(-1, dim)
        lying = math.prod(out.shape[:dim]), out.shape[dim], math.prod(out.shape[dim + 1 :])
        return self._rescaled(out.reshape(lying), bias, x, out.dtype).view(out.shape)

    def scaled_input(self, x: Tensor, low: torch.dtype, live=None) -> Tensor:
        """x̃ = g ⊙ x along the last dimension, for the input axis; low: the dtype in which the layer will compute.

        It lies in memory as x does, since products depend on that in their last bits."""
        y = self._rescaled(flat(x), None, None, low, live).view(x.shape)
        return y if torch.compiler.is_compiling() or x.is_contiguous() else laid_out_as(y, x)

    def _rescaled(self, out: Tensor, bias: Tensor | None, x: Tensor | None, low: torch.dtype, live=None) -> Tensor:
        if torch.compiler.is_compiling():
            return compiled.rescale(self, x, out, bias, low)
        gradients = torch.is_grad_enabled() or forward_ad._current_level >= 0
        f = self.ready(low, not gradients and out.numel() < LIGHT_TOKENS * out.shape[-1])
        if gradients:
            x = None if x is None else x.detach()
            return Composed.apply(x, out, bias, Call(self, f, rescaled=True), *(self.tensors() if live is None else live))
        with no_autocast(out.device):
            return dora.forward(f.gain or f, None, out)[0]

    def _mask(self, x: Tensor) -> tuple[Tensor | None, float]:
        """(which inputs of the low-rank branch are kept, or None for all; the share that is)."""
        if not self.dropout or not self.rank or not self.layer.training:
            return None, 1.0
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - self.dropout)
        return flat(kept), 1.0 - self.dropout


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer will compute: autocast's, or the input's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
