"""The factors of calls, prepared once per change of the parameters for all weights together.

    A, B in the compute dtype      n = |W + s·B·A| (`math/norm.py`)      g = m/n      s·g ⊙ B      1/m and 1/n      (1 − g) ⊙ bias

(Eq. 5.) Weights of one likeness are stacked: some twenty-five operations for all of them, and one product U = W·Aᵀ each. All is
prepared as if no row needed care; which weights do (a norm that cancels, |g| too small to read dm off y, or for g − 1 in a low
precision) is then read once for all, and those are done again by themselves.

Cost: 2·O·I·R FLOPs a weight at the base's own speed and a few passes over A and B; at most `BATCH_NUMBERS` numbers at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases import accumulation_dtype
from ..math import norm
from ..math.dora import Factors
from . import passes

TOO_SMALL = 1e-2
"""Below this |g| a row's magnitude gradient is not read off the output."""

SMALL_GAIN = 0.25
"""Below this g, g − 1 in a low precision would be off by more than the result's own rounding."""

BATCH_NUMBERS = 2**21
"""Numbers of A, B and U that are stacked at once on a CPU; ten times as many elsewhere."""

SMALL = 2**13
"""Numbers of a weight that is copied for a product."""

LARGE = 2**18
"""Weights with more numbers in B cost so much themselves that stacking saves nothing; `norm.terms` takes less memory."""


def prepare(weights: list, low: torch.dtype, suspicion: list[Tensor] = ()) -> bool:
    """Give each weight its factors for calls in the compute dtype `low`. No autograd, no autocast.

    suspicion: scalars that are read together with what is in doubt; returns whether one of them is true."""
    groups: dict[tuple, list] = {}
    for weight in weights:
        groups.setdefault(likeness(weight), []).append(weight)
    doubts, prepared = [], []
    for alike in groups.values():
        for part in _batches(alike):
            if (doubt := _together(part, low)) is not None:
                doubts.append(doubt)
                prepared += part
    if not doubts:
        return bool(suspicion) and any(torch.stack(suspicion).tolist())
    doubts += [scalar.to(doubts[0].dtype).expand(1, 4) for scalar in suspicion]
    flags = torch.cat([doubt.to(doubts[0].device) for doubt in doubts]).tolist()
    for weight, flag in zip(prepared, flags, strict=False):
        if any(flag):
            _with_care(weight, low, *flag)
    return any(flag[0] for flag in flags[len(prepared) :])


def likeness(weight) -> tuple:
    """Weights of which this is equal are prepared in the same operations."""
    if weight._likeness is None or weight.split:  # which has whole tensors at times
        first = next(iter(weight.tensors()), None)
        choices = weight.rank, weight.scaling, weight.magnitude, weight.axis, weight.exact_forward, weight.direction.name
        facts = weight.shape, weight.dtype, weight.device, weight.bias is None, weight.split
        weight._likeness = *choices, *facts, None if first is None else (first.dtype, first.device)
    return weight._likeness


def _batches(alike: list):
    first = alike[0]
    limit = BATCH_NUMBERS if first.device.type == "cpu" else 10 * BATCH_NUMBERS
    step = max(1, limit // max(1, first.rank * (first.shape[-1] + 2 * first.shape[-2])))
    yield from (alike[i : i + step] for i in range(0, len(alike), step))


def _together(weights: list, low: torch.dtype) -> Tensor | None:
    """Prepare weights of one likeness; what is in doubt (L, 4): see `_with_care`. None: nothing can be."""
    first, pairs = weights[0], [weight.low_rank() for weight in weights]
    A_LRI, B_LOR = (stacked([pair[i] for pair in pairs], low) if first.rank else None for i in (0, 1))
    A_LRI = A_LRI if first.direction.plain else _shared_A(weights, A_LRI)
    if not first.magnitude or first.axis == "input":
        _direction_alone(weights, A_LRI, B_LOR, pairs, low)
        return None
    facts = [weight.facts for weight in weights]
    n_LO, cancels_L = _norms(weights, torch.stack([fact.w2 for fact in facts]), A_LRI, B_LOR)
    m_LO = torch.stack([weight.m() for weight in weights])
    frozen_LO = torch.stack([fact.directionless for fact in facts]) if any(fact.frozen is not None for fact in facts) else None
    bias_LO = None if first.bias is None else stacked([weight.bias for weight in weights], m_LO.dtype)
    vectors, doubt_L4 = gains(m_LO, n_LO, frozen_LO, bias_LO, low)
    if cancels_L is not None:
        doubt_L4[:, 0] = cancels_L
    sg_LO1 = (vectors["g"] * first.scaling).unsqueeze(-1)
    if first.rank:
        vectors |= {"A_RI": A_LRI, "B_OR": (sg_LO1 * B_LOR).to(low), "sg": sg_LO1}
        vectors |= {"A_IR": A_LRI.mT, "B_RO": vectors["B_OR"].mT}
    common = vars(Factors.of(g=n_LO[0], A_RI=None if A_LRI is None else A_LRI[0], B_OR=None if A_LRI is None else B_LOR[0]))
    common |= {"s": first.scaling, "wide": m_LO.dtype, "passes": passes.kernels_for(first.device, low)}
    for weight, *values in zip(weights, *(vector.unbind(0) for vector in vectors.values()), strict=True):
        weight.factors = Factors(**common | dict(zip(vectors, values, strict=True)))
    return doubt_L4


def stacked(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Tensors of one shape as one, rounded to `dtype`."""
    if tensors[0].dtype == dtype:
        return torch.stack(tensors)
    out = torch.empty((len(tensors), *tensors[0].shape), dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(list(out.unbind(0)), tensors)
    return out


def _shared_A(weights: list, A_LRI: Tensor | None) -> Tensor | None:
    """A of weights of one likeness, as a view of what they share with all layers, where they do; the copy is let go."""
    if A_LRI is None or len(weights[0].shape) != 2:
        return A_LRI
    shared = weights[0].direction.shared_A(weights[0].shape, A_LRI.device, A_LRI.dtype)
    return A_LRI if shared is None else shared.expand(len(weights), *shared.shape)


def _norms(weights: list, w2_LO: Tensor, A_LRI: Tensor | None, B_LOR: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(n (L, O), which weights' norm needs `norm.terms` (L,) or None), from A and B as the forward rounds them."""
    first = weights[0]
    if A_LRI is None:
        return w2_LO.sqrt_(), None
    if B_LOR[0].numel() > LARGE or first.split:
        return torch.stack([_one_norm(w, A, B) for w, A, B in zip(weights, A_LRI, B_LOR, strict=True)]), None
    U_LOR = _products(weights, A_LRI).to(w2_LO.dtype)
    A_LRI, B_LOR = A_LRI.to(w2_LO.dtype), B_LOR.to(w2_LO.dtype)
    return norm.stacked(U_LOR, A_LRI, B_LOR, first.scaling, w2_LO, *norm.limits(first))


def _products(weights: list, A_LRI: Tensor) -> Tensor:
    """U = W·Aᵀ (L, O, R). Small plain weights are stacked, too: a product of each costs more to start than to compute."""
    first = weights[0]
    small = first.base.writable and first.shape[0] * first.shape[1] <= SMALL and A_LRI.dtype == first.dtype
    if small and not any(weight.keep_product for weight in weights):
        W_LOI = torch.stack([weight.base.matrix(weight.layer) for weight in weights])
        return torch.bmm(W_LOI, A_LRI.mT)
    products = []
    for weight, A_RI in zip(weights, A_LRI, strict=True):
        U_OR = weight.kept_product(A_RI)
        products.append(norm.times_A(weight, A_RI) if U_OR is None else U_OR)
    return torch.stack(products)


def _one_norm(weight, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """n (O,) of one large weight, or of one that is split; on CUDA one pass over a dense W where that is faster."""
    matrix = weight.base.matrix(weight.layer) if weight.base.writable and A_RI.is_cuda and not weight.split else None
    if matrix is None or matrix.dtype != A_RI.dtype:
        return weight.terms(A_RI, B_OR).n
    return passes.direct_norm(matrix, A_RI, B_OR, weight.scaling, lambda: weight.terms(A_RI, B_OR).n)


def gains(m_LO: Tensor, n_LO: Tensor, frozen_LO: Tensor | None, bias_LO: Tensor | None, low: torch.dtype):
    """({name in `Factors`: (L, O)}, doubt (L, 4)); frozen: rows without direction, where g = 1 for good."""
    if frozen_LO is not None:
        m_LO, n_LO = m_LO.masked_fill(frozen_LO, 1.0), n_LO.masked_fill(frozen_LO, 1.0)
    g_LO, per_m, per_n = m_LO / n_LO, m_LO.reciprocal(), n_LO.reciprocal()
    if frozen_LO is not None:
        per_m, per_n = per_m.masked_fill_(frozen_LO, 0.0), per_n.masked_fill_(frozen_LO, 0.0)
    vectors = {"g": g_LO, "n": n_LO, "per_m": per_m, "per_n": per_n}
    least = g_LO.abs().amin(1, keepdim=True) if m_LO.shape[1] else torch.ones_like(m_LO).sum(1, keepdim=True) + 1
    doubt = torch.zeros(len(m_LO), 4, dtype=m_LO.dtype, device=m_LO.device)
    doubt[:, 1:2] = least < TOO_SMALL
    if low != m_LO.dtype:
        vectors["g_minus_1"] = ((m_LO - n_LO) * n_LO.reciprocal()).to(low)
        doubt[:, 2:3] = least < SMALL_GAIN
    if bias_LO is not None:
        vectors |= {"bias": bias_LO, "shift": (1 - g_LO) * bias_LO}
        if low != m_LO.dtype:
            doubt[:, 3] = bias_LO.any(1)
    return vectors, doubt


def _with_care(weight, low: torch.dtype, cancels: float, small: float, wide: float, drowned: float) -> None:
    """What is in doubt of one weight: its norm cancels, some |g| is too small to read dm off y, some g for g − 1 in `low`, a bias
    could drown outputs."""
    f = weight.factors
    if cancels:
        A, B = weight.low_rank()
        n_1O = weight.terms(A.to(low), B).n[None]
        facts, bias = weight.facts, weight.bias
        mask = None if facts.frozen is None else facts.frozen[None]
        vectors, doubt = gains(weight.m()[None], n_1O, mask, None if bias is None else bias[None].to(n_1O.dtype), low)
        for name, vector in vectors.items():
            setattr(f, name, vector[0])
        f.sg = (f.g * weight.scaling).unsqueeze(-1)
        f.B_OR = (f.sg * B.to(low)).to(low)
        f.B_RO = f.B_OR.T
        _, small, wide, drowned = doubt[0].tolist()
    f.care = (f.g.abs() < TOO_SMALL).nonzero().squeeze(1) if small else None
    if wide:
        f.g_minus_1 = None
    f.drowned = bool(drowned)


def _direction_alone(weights: list, A_LRI: Tensor | None, B_LOR: Tensor | None, pairs: list, low: torch.dtype) -> None:
    """Factors without a gain on the output: LoRA's, and on the input axis, whose gain is on the input."""
    first, wide = weights[0], accumulation_dtype(weights[0].dtype)
    sB_LOR = None if B_LOR is None else B_LOR * first.scaling
    for i, weight in enumerate(weights):
        low_rank = {} if A_LRI is None else {"A_RI": A_LRI[i], "B_OR": sB_LOR[i]}
        f = weight.factors = Factors.of(s=first.scaling, sg=first.scaling, wide=wide, **low_rank)
        if weight.magnitude:
            n = weight.facts.w2.sqrt() if A_LRI is None else weight.terms(A_LRI[i], pairs[i][1]).n
            frozen = weight.facts.frozen
            vectors, _ = gains(weight.m()[None], n[None], None if frozen is None else frozen[None], None, low)
            del vectors["g_minus_1" if "g_minus_1" in vectors else "per_m"]
            f.gain = Factors.of(s=first.scaling, wide=f.wide, **{name: vector[0] for name, vector in vectors.items()})
