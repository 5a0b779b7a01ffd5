"""What one layer is adapted with, and the layer as the op sees it in one call.

`Adaptation` composes the three independent choices, layer kind × base storage × direction, and holds what is derived from
the layer's tensors: w² and the rows without direction (once per W), the norm (once per change of A and B), and the ready
factors of inference (once per change of A, B and m).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..bases import Base, accumulation_dtype
from ..directions import Direction
from ..math import decomposition, norm
from ..math.cache import NormCache
from ..math.compose import Factors, Inputs, make_factors, no_autocast
from ..math.op import Handle
from .together import Siblings, norm_and_siblings

TOO_SMALL = 1e-2
"""Below this |g| a row's magnitude gradient is not read off the output."""

DROWNS = 4.0
"""From this ratio of bias to the rest of an output on, neither."""


class FrozenFacts(NamedTuple):
    """w² and the rows (columns) without direction; `frozen` is the same mask, or None where there are none."""

    w2: Tensor
    directionless: Tensor
    frozen: Tensor | None


@dataclass
class Adaptation:
    """What one layer is adapted with. Picklable, copied with the module; never shared between layers."""

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
    cache: NormCache = field(default_factory=NormCache)
    factors: NormCache = field(default_factory=NormCache)
    handle: Handle = field(default_factory=Handle)
    siblings: Siblings = field(default_factory=Siblings)
    epoch: int = 0
    calls: int = 0  # how often the adapted forward really ran
    keep_product: bool = False  # VeRA: A is frozen, so U = W·Aᵀ may be kept
    _product: tuple | None = None
    _facts: tuple | None = None
    _small: tuple | None = None
    _likeness: tuple | None = None

    def matrices(self, module: nn.Module) -> list:
        """The layers with one matrix each that this layer is made of: itself, or its experts."""
        return [module]

    def create(self, module: nn.Module, seed: int, dtype: torch.dtype, device) -> None:
        """Register the direction's parameters with their first values."""
        self.direction.create(module, self.base.shape(module), self.rank, seed, dtype, device)

    def factors_of(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """(A (K, I), B (O, K)) of ΔV = s·B·A, differentiable in what is trained."""
        return self.direction.factors(module)

    def trained_magnitude(self, module: nn.Module) -> Tensor | None:
        """The parameter behind m."""
        return module.magnitude_delta if self.relative else module.magnitude

    def frozen_facts(self, module: nn.Module) -> FrozenFacts:
        """What is known of W: computed once, and again only when W changed."""
        version = self.base.version(module)
        if self._facts is None or self._facts[0] != version:
            length = self.base.shape(module)[0 if self.axis == "output" else 1]
            dtype = accumulation_dtype(self.base.dtype(module))
            with torch.inference_mode(False), torch.no_grad(), no_autocast(self.base.device(module)):
                tiles = self.base.row_tiles(module)
                w2 = decomposition.squared_norms(tiles, length, self.axis, dtype, self.base.device(module))
                directionless = decomposition.directionless(w2.sqrt())
                some = not directionless.is_meta and bool(directionless.any())
                # W is held, so that its address stays its own: another weight there would pass for it
                self._facts = version, FrozenFacts(w2, directionless, directionless if some else None), self.base.held(module)
        return self._facts[1]

    def belongs_to(self, module: nn.Module) -> None:
        """Make the layer known to the ops and to its siblings."""
        self.handle.bind(module)
        self.siblings.modules.add(module)

    @property
    def made(self) -> bool:
        """Are A and B made anew for each call, so that they have no identity of their own?"""
        return self.direction.name not in ("lora", "none")

    def context(self, module: nn.Module, dtype: torch.dtype) -> tuple:
        """What a norm depends on besides A and B."""
        return self.epoch, dtype, self.base.version(module)

    def changed(self) -> None:
        """Something may have changed A, B or W: recompute what was derived."""
        self.epoch += 1
        self.cache.clear()
        self.factors.clear()
        self._facts = self._small = self._product = None

    def kept_product(self, module: nn.Module, A: Tensor) -> Tensor | None:
        """U = W·Aᵀ (O, R), computed once per W and dtype; None where it is not to be kept."""
        if not self.keep_product:
            return None
        key = A.dtype, self.base.version(module)
        if self._product is None or self._product[0] != key:
            self._product = key, norm.base_times_A(self.base, module, A)
        return self._product[1]


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
    def axis(self) -> str:
        return self.adaptation.axis

    @property
    def facts(self) -> FrozenFacts:
        return self.adaptation.frozen_facts(self.module)

    @property
    def frozen(self) -> Tensor | None:
        return self.adaptation.frozen_facts(self.module).frozen

    def norm(self, A: Tensor | None, B: Tensor | None, dtype: torch.dtype, tokens: int) -> Tensor:
        """n in fp32, of A and B rounded to `dtype`; cached."""
        a = self.adaptation
        if A is None:
            w2 = a.frozen_facts(self.module).w2
            return a.cache.get((), (a.epoch, self.base.version(self.module)), 0, w2.sqrt)
        context, sources = a.context(self.module, dtype), a.direction.sources(self.module) if a.made else (A, B)
        return a.cache.get(sources, context, tokens, lambda: norm_and_siblings(self, A, B, dtype), self.gradients)

    def factors(self, A: Tensor | None, B: Tensor | None, m: Tensor | None, dtype: torch.dtype, tokens: int, low: bool) -> Factors:
        """What inference needs, ready to use; cached."""
        a = self.adaptation
        parts = (*a.direction.sources(self.module), a.trained_magnitude(self.module)) if a.made or a.relative else (A, B, m)
        sources = tuple(t for t in parts if t is not None)
        context = a.context(self.module, dtype)
        return a.factors.get(sources, context, tokens, lambda: make_factors(self, A, B, m, dtype, tokens, low))

    def terms(self, A: Tensor, B: Tensor) -> norm.Terms:
        """The norm's parts, uncached. A already in the dtype of the forward."""
        a = self.adaptation
        with torch.no_grad(), no_autocast(A.device):
            w2 = a.frozen_facts(self.module).w2
            return norm.terms(a.base, self.module, A, B, a.scaling, w2, a.axis, a.kept_product(self.module, A))

    def redone(self, A: Tensor, B: Tensor) -> Tensor:
        return self.terms(A, B).redone

    def small_rows(self, g: Tensor, given: Inputs) -> Tensor | tuple:
        """Indices of the rows whose magnitude gradient y cannot give: |g| < 1e-2, or a bias that drowns the rest of y.

        On CUDA they are looked for once per change of the norm or m, with a margin: each look waits for the device."""
        a = self.adaptation
        if not g.is_cuda:
            doubtful = doubt(g, given, TOO_SMALL)
            return doubtful.nonzero().squeeze(1) if doubtful.any() else ()
        key = a.cache.evaluations, given.m.data_ptr(), given.m._version
        if a._small is None or a._small[0] != key or a.relative:
            a._small = key, doubt(g, given, 2 * TOO_SMALL).nonzero().squeeze(1)
        return a._small[1]


def doubt(g: Tensor, given: Inputs, too_small: float) -> Tensor:
    """Which rows (O,): |g| small, or |bias| above 4 times what a row of y − bias is expected to be, |m|·rms(x)."""
    doubtful = g.abs() < too_small
    if given.bias is None:
        return doubtful
    x = given.x[:: max(1, len(given.x) // 64)]
    typical = given.m.abs() * x.square().mean(dtype=given.m.dtype).sqrt()
    return doubtful | (given.bias.abs() > DROWNS * typical)
