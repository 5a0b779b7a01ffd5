"""An adapted weight: layer kind × base × direction, its settings, and one place that decides how a call runs.

    ready       the factors of a call (`math/dora.py`), prepared anew when something changed (`prepared.py`)
    compose     y from x and the base's output, or from x and W: three ways through the same maths,
                eager with gradients (`math/autograd.py`), without (`math/dora.py` itself), traced (`math/compiled.py`)
    rescale     y from an output that holds the low-rank part already (convolutions, embeddings, the input axis' x̃)

A layer has its weight as `layer.adapted`. Parts of a layer (experts, rows of a packed weight) have weights of their own (`parts.py`).

Cost: a call of an eager layer asks for its parameters' addresses and versions, nothing else.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..bases import Base, accumulation_dtype
from ..directions import Direction
from ..math import compiled, decomposition, dora, norm
from ..math.autograd import Call, Composed, flat, grad_enabled, modes, no_autocast
from ..math.dora import Factors
from .fingerprint import identity, tensor_in
from .registry import LIGHT_TOKENS, Registry

MAGNITUDES = {False: ("magnitude",), True: ("magnitude_delta", "magnitude_start")}
"""Names of the parameters behind m, by `relative`."""


class FrozenFacts(NamedTuple):
    """w² and the rows (columns) without direction; `frozen` is the same mask, or None where there are none."""

    w2: Tensor
    directionless: Tensor
    frozen: Tensor | None


@dataclass(eq=False)
class AdaptedWeight:
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
    calls: int = 0  # how often the adapted forward really ran
    preparations: int = 0  # how often its factors were prepared
    factors: Factors | None = None
    asked: bool = False  # since the last preparation
    own_product: bool = False  # the op may compute the base's product
    plain: bool = False  # A, B and m are the parameters themselves, and the norm is a constant to the backward
    names: tuple[str, ...] = ()  # of its parameters: the direction's, then those behind m
    watched_names: tuple[str, ...] = ()  # of the layer's tensors that factors are made of, besides W
    _facts: tuple | None = None
    _product: tuple | None = None
    _likeness: tuple | None = None
    _layer: object = None

    def __post_init__(self):
        self.plain = self.direction.plain and not self.relative and not self.full_gradient
        self.names = (*self.direction.names, *(MAGNITUDES[self.relative] if self.magnitude else ()))
        if self.kind.prepares(self):
            self.watched_names = (*self.names, *((self.kind.bias_name,) if self.magnitude else ()))

    # -- the layer ---------------------------------------------------------------------------------------------------------

    @property
    def layer(self):
        return self._layer()

    def belongs_to(self, layer) -> None:
        """Make the layer known to the ops and to the others of its attachment."""
        self._layer = weakref.ref(layer)
        self.own_product = self.kind.own_product(self, getattr(type(layer), "plain_class", type(layer)))
        self.handle.bind(self)
        self.registry.add(self)

    def __getstate__(self):
        state = self.__dict__.copy()
        derived = ("factors", "_facts", "_product", "_likeness", "_layer")
        return state | dict.fromkeys(derived) | {"asked": False, "preparations": 0}

    def tensors(self) -> tuple[Tensor, ...]:
        """Its parameters, in the order of `names`."""
        return self.parameters(self.names)

    def parameters(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        layer = self.layer
        own = layer._parameters
        return tuple(own[name] if name in own else getattr(layer, name, None) for name in names)

    def standing_in(self, tensors, W: Tensor | None):
        """A context in which the layer holds what a call was given (`functional_call`): its parameters, or () for its own, and W."""
        layer, own = self.layer, {}
        for name, t in zip(self.names, tensors) if tensors else ():
            if (mine := layer._parameters.get(name)) is not None and mine.data_ptr() != t.data_ptr():
                own[layer, name] = t
        home, name = self.kind.home(layer), self.kind.weight_name
        if W is not None and (mine := home._parameters.get(name)) is not None and mine.data_ptr() != W.data_ptr():
            own[home, name] = W
        return _stand_in(own) if own else contextlib.nullcontext()

    def matrices(self) -> list:
        """The weights with one matrix each that this is made of: itself, or its experts."""
        return [self]

    def create(self, layer, seed: int, dtype: torch.dtype, device) -> None:
        """Register the direction's parameters with their first values."""
        self.direction.create(layer, self.base.shape(layer), self.rank, seed, dtype, device)

    # -- W, as the maths asks for it (`math.norm.Weight`) --------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape(self.layer)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype(self.layer)

    @property
    def device(self) -> torch.device:
        return self.base.device(self.layer)

    @property
    def exact_forward(self) -> bool:
        return self.base.exact_forward

    def forward_rows(self, rows_KI: Tensor) -> Tensor:
        return self.base.forward_rows(self.layer, rows_KI)

    def backward_rows(self, rows_KO: Tensor) -> Tensor:
        return self.base.backward_rows(self.layer, rows_KO)

    def row_tiles(self, rows: Tensor | None = None):
        return self.base.row_tiles(self.layer, rows)

    def output_columns(self, x: Tensor, rows: Tensor) -> Tensor:
        """Columns `rows` of the layer's product without bias (T, K) in the wide dtype."""
        return self.kind.output_columns(self, x, rows)

    @property
    def facts(self) -> FrozenFacts:
        """What is known of W: computed once, and again only when W changed."""
        layer = self.layer
        version = self.base.version(layer), self.registry.steps if self.base.trained(layer) else 0
        if self._facts is None or self._facts[0] != version:
            length, device = self.shape[0 if self.axis == "output" else 1], self.device
            with torch.inference_mode(False), torch.no_grad(), no_autocast(device):
                wide = accumulation_dtype(self.dtype)
                w2 = decomposition.squared_norms(self.row_tiles(), length, self.axis, wide, device)
                directionless = decomposition.directionless(w2.sqrt())
                some = not directionless.is_meta and bool(directionless.any())
                # W is held, so that its address stays its own: another weight there would pass for it
                self._facts = version, FrozenFacts(w2, directionless, directionless if some else None), self.base.held(layer)
        return self._facts[1]

    # -- ΔV and the norm -----------------------------------------------------------------------------------------------------

    def low_rank(self, tensors: tuple[Tensor, ...] | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(A (K, I), B (O, K)) of ΔV = s·B·A, differentiable in what is trained."""
        own = self.parameters(self.direction.names) if tensors is None else tensors[: len(self.direction.names)]
        return own if self.direction.plain and self.rank else self.direction.factors(own, self.shape)

    def m(self, tensors: tuple[Tensor, ...] | None = None) -> Tensor | None:
        """m (O,) or (I,), differentiable; None without a magnitude."""
        if not self.magnitude:
            return None
        tensors = self.tensors() if tensors is None else tensors
        return tensors[-1] * tensors[-2].exp() if self.relative else tensors[-1]

    def terms(self, A: Tensor, B: Tensor) -> norm.Terms:
        """The norm's parts; A in the dtype of the forward, to which B is rounded too."""
        with torch.no_grad(), no_autocast(A.device):
            return norm.terms(self, A, B, self.scaling, self.facts.w2, self.axis, self.kept_product(A))

    def n(self, dtype: torch.dtype | None = None) -> Tensor:
        """|W + s·B·A| (O,) or (I,) as calls in `dtype` (default: W's) use it."""
        f = self.ready(dtype or self.dtype)
        return (f if f.gain is None else f.gain).n

    def kept_product(self, A: Tensor) -> Tensor | None:
        """U = W·Aᵀ (O, R), computed once per W and dtype; None where it is not to be kept."""
        if not self.keep_product:
            return None
        key = A.dtype, self.base.version(self.layer)
        if self._product is None or self._product[0] != key:
            self._product = key, norm.times_A(self, A)
        return self._product[1]

    def redone(self, A: Tensor, B: Tensor) -> Tensor:
        """Indices of rows whose norm cancels."""
        return self.terms(A, B).redone

    def pull_back(self, tensors: tuple[Tensor, ...], dA, dB, dm, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of `tensors` from those of A, B and m."""
        count = len(self.direction.names)
        if not any(needed[:count]) or (dA is None and dB is None):
            grads = (None,) * count
        elif self.direction.plain:
            grads = dA, dB
        else:
            grads = self.direction.pull_back(tensors[:count], self.shape, dA, dB, needed[:count])
        if not self.magnitude:
            return grads
        if self.relative:
            return *grads, dm * self.m(tensors) if needed[-2] else None, None
        return *grads, dm if needed[-1] else None

    # -- what is derived -----------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something may have changed A, B or W: everything that was derived is made anew."""
        self.factors = self._facts = self._product = self._likeness = None

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
        return [(own if name in own else layer, name) for name in self.watched_names]

    def frozen_slot(self) -> tuple | None:
        """Where W is, if it is one plain tensor that factors are made of."""
        if not self.base.writable or not self.magnitude or not self.watched_names:
            return None
        return self.kind.home(self.layer)._parameters, self.kind.weight_name

    def stamps(self) -> list[tuple]:
        """(holder, name, address, version) of everything that factors are made of."""
        slots = [*self.slots(), *([slot] if (slot := self.frozen_slot()) else [])]
        return [(*slot, *identity(tensor_in(slot))) for slot in slots]

    def storage(self) -> tuple | None:
        """What else tells that W is as it was, where it is no plain tensor."""
        return self.base.version(self.layer) if self.magnitude and not self.base.writable else None

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

    # -- a call --------------------------------------------------------------------------------------------------------------

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


CACHE_LINE = 64
"""Bytes."""


@contextlib.contextmanager
def _stand_in(tensors: dict):
    """tensors: (module, name) → what stands in its parameter's place meanwhile."""
    replaced = {(module, name): module._parameters[name] for module, name in tensors}
    try:
        for (module, name), t in tensors.items():
            module._parameters[name] = t.detach()
        yield
    finally:
        for (module, name), p in replaced.items():
            module._parameters[name] = p


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides of x, and as far from a cache line's beginning."""
    once = [size if stride else 1 for size, stride in zip(x.shape, x.stride(), strict=True)]  # dimensions that were expanded
    reach = sum((size - 1) * stride for size, stride in zip(once, x.stride(), strict=True) if size) + 1
    flat_y = torch.empty(reach + CACHE_LINE // y.itemsize, dtype=y.dtype, device=y.device)
    offset = (x.data_ptr() - flat_y.data_ptr()) % CACHE_LINE // y.itemsize
    small = flat_y.as_strided(once, x.stride(), offset)
    return small.copy_(y[tuple(slice(0, size) for size in once)]).expand(x.shape)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer will compute: autocast's, or the input's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
