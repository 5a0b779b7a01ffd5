"""The frozen weight W (O, I) of an adapted one, as the maths asks for it (`math.norm.Weight`): products, rows, what is known of it.

    facts      w² and the rows without direction: once per W
    terms      the parts of |W + s·B·A|² of given factors
    standing_in    the layer with what a call was given in place of its own tensors (`functional_call`)

Cost: one pass over W for the facts; U = W·Aᵀ (O, R) where it is kept.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..bases import accumulation_dtype
from ..math import decomposition, norm
from ..math.autograd import no_autocast
from . import shares
from .fingerprint import identity


class FrozenFacts(NamedTuple):
    """w² and the rows (columns) without direction; `frozen` is the same mask, or None where there are none."""

    w2: Tensor
    directionless: Tensor
    frozen: Tensor | None


class FrozenWeight:
    """What an adapted weight is to the maths; it has a `layer`, a `base`, an `axis`, a `scaling` and a `registry`."""

    _facts: tuple | None
    _product: tuple | None
    shares: dict
    split: object = None
    """How it is split over processes of which each computes a part (`tensor_parallel.Split`)."""
    summed: Tensor | None = None
    """w² as its m started, where that was summed over processes, each of which had columns of W: its bits, for an exact start."""

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

    @property
    def s(self) -> float:
        """The factor of B·A that a call has which begins now."""
        return self.scaling

    def scale_by(self, s: float) -> None:
        """Take s for the calls to come."""
        if s != self.scaling:
            self.scaling = s
            self.factors = self._likeness = None

    def forward_rows(self, rows_KI: Tensor) -> Tensor:
        return self.base.forward_rows(self.layer, rows_KI)

    def backward_rows(self, rows_KO: Tensor) -> Tensor:
        return self.base.backward_rows(self.layer, rows_KO)

    def row_tiles(self, rows: Tensor | None = None):
        return self.base.row_tiles(self.layer, rows)

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums over what other processes have of the same rows (columns), along which the norm runs; of a whole weight, `parts`."""
        return parts if self.split is None else self.split.total(self, parts)

    def output_columns(self, x: Tensor, rows: Tensor) -> Tensor:
        """Columns `rows` of the layer's product without bias (T, K) in the wide dtype."""
        return self.kind.output_columns(self, x, rows)

    @property
    def facts(self) -> FrozenFacts:
        """What is known of W: computed once, and again only when W changed."""
        layer = self.layer
        version = self.version(), self.registry.steps if self.base.trained(layer) else 0
        if self._facts is None or self._facts[0] != version:
            self.know(self.stored())
        return self._facts[1]

    def know(self, W: Tensor | None) -> None:
        """Find the facts of W; of a share of it (`shares.squared_norms`) every process does."""
        version = self.version(), self.registry.steps if self.base.trained(self.layer) else 0
        length, device = self.shape[0 if self.axis == "output" else 1], self.device
        with torch.inference_mode(False), torch.no_grad(), no_autocast(device):
            if shares.is_share(W):
                w2 = shares.squared_norms(self, W)
            else:
                wide = accumulation_dtype(self.dtype)
                (w2,) = self.total(decomposition.squared_norms(self.row_tiles(), length, self.axis, wide, device))
                w2 = w2 if self.summed is None else as_summed(w2, self.summed.to(w2))
            directionless = decomposition.directionless(w2.sqrt())
            some = not directionless.is_meta and bool(directionless.any())
            # W is held, so that its address stays its own: another weight there would pass for it
            self._facts = version, FrozenFacts(w2, directionless, directionless if some else None), self.held()

    def stored(self) -> Tensor | None:
        """What stands in the layer for W: a tensor, or this process's share of it."""
        return self.kind.home(self.layer)._parameters.get(self.kind.leaf(self.layer))

    def share(self) -> object | None:
        """Where W's own numbers are, if whole copies of it come and go."""
        return self.shares.get(self.kind.leaf(self.layer)) if self.shares else None

    def version(self) -> tuple:
        """Changes when W does, and between a part of it and the whole, but not with a copy."""
        share = self.share()
        return self.base.version(self.layer) if share is None else (*identity(share.local), self.shape)

    def held(self) -> object:
        """What keeps the memory of W, or of this process's share of it, its own."""
        share = self.share()
        return self.base.held(self.layer) if share is None else share.local

    def let_go(self) -> None:
        """Facts of a W that was whole once would keep its memory: forget them, if W is in shards by now."""
        if self.shares and self._facts is not None and self._facts[2] is not self.held():
            self._facts = None

    def holding(self, W: Tensor):
        """A context in which the layer has W, some of its own rows or columns, in its weight's place."""
        return stand_in({(self.kind.home(self.layer), self.kind.leaf(self.layer)): W})

    def terms(self, A: Tensor, B: Tensor) -> norm.Terms:
        """The norm's parts; A in the dtype of the forward, to which B is rounded too."""
        with torch.no_grad(), no_autocast(A.device):
            return norm.terms(self, A, B, self.scaling, self.facts.w2, self.axis, self.kept_product(A))

    def norm_of(self, A: Tensor | None, B: Tensor | None) -> Tensor:
        """|W + B·A| of any pair, rounded as calls in W's dtype round it."""
        if A is None:
            return self.facts.w2.sqrt()
        with torch.no_grad(), no_autocast(A.device):
            return norm.terms(self, A.to(self.dtype), B.to(self.dtype), 1.0, self.facts.w2, self.axis).n

    def kept_product(self, A: Tensor) -> Tensor | None:
        """U = W·Aᵀ (O, R), computed once per W and dtype; None where it is not to be kept."""
        if not self.keep_product:
            return None
        key = A.dtype, self.version()
        if self._product is None or self._product[0] != key:
            self._product = key, norm.times_A(self, A)
        return self._product[1]

    def redone(self, A: Tensor, B: Tensor) -> Tensor:
        """Indices of rows whose norm cancels."""
        return self.terms(A, B).redone

    def standing_in(self, tensors, W: Tensor | None):
        """A context in which the layer holds what a call was given (`functional_call`): its parameters, () for its own, and W."""
        layer, own = self.layer, {}
        for name, t in zip(self.names, tensors) if tensors else ():
            if (mine := layer._parameters.get(name)) is not None and mine.data_ptr() != t.data_ptr():
                own[layer, name] = t
        home, name = self.kind.home(layer), self.kind.weight_name
        if W is not None and (mine := home._parameters.get(name)) is not None and mine.data_ptr() != W.data_ptr():
            own[home, name] = W
        return stand_in(own) if own else contextlib.nullcontext()


def as_summed(w2: Tensor, summed: Tensor) -> Tensor:
    """The same numbers as they were summed in another order, if they still are the same."""
    return summed if w2.shape == summed.shape and torch.allclose(w2, summed, rtol=2**-20, atol=0) else w2


@contextlib.contextmanager
def stand_in(tensors: dict):
    """tensors: (module, name) → what stands in its parameter's place meanwhile."""
    replaced = {(module, name): module._parameters[name] for module, name in tensors}
    try:
        for (module, name), t in tensors.items():
            module._parameters[name] = t.detach()
        yield
    finally:
        for (module, name), p in replaced.items():
            module._parameters[name] = p
