"""The norms of many layers at once: the first layer that asks after an optimizer step gets them for its siblings too.

A norm is some twenty operations on small matrices; for 150 layers on CPU their overhead is several per cent of a training step.
Stacked, layers of one shape share them (`norm.magnitudes`); only U = W·Aᵀ stays one product a layer. What is made ahead is
kept under the same key as ever (`math/cache.py`): a parameter that changes before its layer is called is still seen.

CPU only: on CUDA the direct norm is one kernel. Memory: at most `BATCH_NUMBERS` numbers of A, B and U each time.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ..math import decomposition, kernels, norm
from ..math.compose import no_autocast

BATCH_NUMBERS = 2**21
LARGE = 2**18
"""Layers with more numbers in B cost so much themselves that sharing operations saves nothing; `norm.terms` takes less memory."""


class Siblings:
    """The adapted layers of one model; copies of the model have siblings of their own."""

    def __init__(self):
        self.modules = weakref.WeakSet()

    def __deepcopy__(self, memo):
        return Siblings()

    def __reduce__(self):
        return Siblings, ()

    def stale(self, module: nn.Module, dtype: torch.dtype, limit: int) -> list[nn.Module]:
        """At most `limit` layers like `module` whose norm in this compute dtype an optimizer step has made old."""
        likeness, found = alike(module), []
        for other in self.modules:
            a = vars(other).get("adaptation")
            if a is None or other is module or len(found) == limit or alike(other) != likeness:
                continue
            if a.cache.stale(a.context(other, dtype)) and a.frozen_facts(other).frozen is None:
                found.append(other)
        return found


def alike(module: nn.Module) -> tuple:
    """Layers of which this is equal can share the operations of their norms."""
    a, A = module.adaptation, getattr(module, "lora_A", None)
    if a._likeness is None or a._likeness[0] != a.epoch:
        choices = a.kind.name, a.base.name, a.base.exact_forward, a.direction.name, a.rank, a.scaling, a.axis
        facts = *choices, a.base.shape(module), a.base.dtype(module), a.base.device(module)
        a._likeness = a.epoch, (*facts, None if A is None else (A.dtype, A.device))
    return a._likeness[1]


def norm_and_siblings(site, A_RI: Tensor, B_OR: Tensor, dtype: torch.dtype) -> Tensor:
    """n (O,) of the site's layer, from A and B rounded to `dtype`; its stale siblings' norms go into their caches."""
    module, a = site.module, site.adaptation
    if A_RI.is_cuda and a.axis == "output" and a.base.name == "dense" and a.base.dtype(module) == dtype:
        return _direct(site, A_RI.to(dtype), B_OR.to(dtype))
    small = 0 < B_OR.numel() <= LARGE and A_RI.device.type == "cpu" and not a.made
    if not small or a.axis != "output" or a.frozen_facts(module).frozen is not None or not a.base.exact_forward:
        return site.terms(A_RI.to(dtype), B_OR).n
    each = A_RI.numel() + 2 * B_OR.numel()
    others = a.siblings.stale(module, dtype, max(1, BATCH_NUMBERS // each) - 1)
    pairs = [(A_RI, B_OR), *((other.lora_A, other.lora_B) for other in others)]
    A_LRI, B_LOR = (torch.stack([pair[i] for pair in pairs]).to(dtype) for i in (0, 1))
    w2_LO = torch.stack([m.adaptation.frozen_facts(m).w2 for m in (module, *others)])
    with no_autocast(A_RI.device):
        n_LO, trusted = norm.magnitudes([module, *others], A_LRI, B_LOR, a.scaling, w2_LO)
    n = [n_O.clone() if good else None for n_O, good in zip(n_LO, trusted, strict=True)]
    for i in range(len(n)):
        if n[i] is None:
            n[i] = (others[i - 1] if i else module).op_site(site.gradients).terms(A_LRI[i], B_LOR[i]).n
    for other, pair, n_O in zip(others, pairs[1:], n[1:], strict=True):
        other.adaptation.cache.put(pair, other.adaptation.context(other, dtype), n_O)
    return n[0]


def _direct(site, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """n of a dense layer on CUDA: one pass over W where that is faster."""
    module, a = site.module, site.adaptation
    W_OI = a.base.matrix(module).detach()
    n = kernels.direct_norm(W_OI, A_RI, B_OR, a.scaling, lambda: site.terms(A_RI, B_OR).n)
    return torch.maximum(n, decomposition.TINY * a.frozen_facts(module).w2.sqrt())
