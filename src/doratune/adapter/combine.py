"""New adapters out of others, on the same model: sums, and the line from the base to one of them.

    combine    V = W + Σ t_k·s_k·B_k·A_k, m = w + Σ t_k·(m_k − w) over adapters with a magnitude; t·s·B·A of those without one is
               added outside the norm: order-independent, and the base where all t are 0
    strength   W + t·(W′ − W) of one adapter, exactly

Both are rewritten as Eq. 5 with a low-rank V′ − W, so that the result is an ordinary adapter: training, evaluation, saving and
merging of it are the same thing.

    g ⊙ V + ΔL            = g·n′ ⊙ V′/n′,   V′ = V + ΔL/g,           n′ = |V′|
    W + t·(g ⊙ V − W)     = γ·n′ ⊙ V′/n′,   V′ = W + (t·g/γ) ⊙ ΔV,   γ = 1 − t + t·g

Cost: two norms a layer; the new adapter's rank is the sum of the others'.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from ..errors import UserError, listed
from ..layers.layouts import named_layers
from ..layers.weight import AdaptedWeight
from ..layers.wrappers import unwrapped
from .attach import adapters, attach_selection, record_of
from .several import check_known, layers_of, record_named, room_for
from .states import Model
from .targets import Selection


def combine(model: Model, weights: Mapping[str, float], name: str) -> Model:
    """A new adapter out of several, in use afterwards: V = W + Σ t·s·B·A, m = w + Σ t·(m − w), LoRA's t·s·B·A outside the norm.

    Args:
        weights: name → t; the order does not matter, and where all are 0 the result is the base.

    Raises:
        UserError: no adapter of a name, a name that is taken, magnitudes along different axes, modules that are trained whole.
    """
    _check_weights(model, weights)
    return _made_of(model, {key: float(t) for key, t in weights.items()}, name, combined)


def strength(model: Model, adapter: str, t: float, name: str) -> Model:
    """A new adapter on the line from the base (t = 0, bit for bit) to `adapter` (t = 1), in use afterwards: W + t·(W′ − W).

    Raises:
        UserError: as `combine`; or a row's scale 1 − t + t·g is 0, where no direction would be left.
    """
    _check_weights(model, {adapter: t})
    return _made_of(model, {adapter: float(t)}, name, on_the_line)


@torch.no_grad()
def _made_of(model: nn.Module, weights: dict[str, float], name: str, rule) -> nn.Module:
    """Attach the adapter that `rule` makes of the others, layer by layer."""
    whole, model = model, unwrapped(model)
    parts, configs = _parts(model, weights)
    config, layers = configs[0], list(parts)
    pairs = {layer: rule({n: module.adapted for n, module in each.items()}, weights) for layer, each in parts.items()}
    magnitude = any(c.has_magnitude for c in configs)
    ranks = {layer: 0 if A is None else len(A) for layer, (A, _, _) in pairs.items()}
    largest = max([1, *ranks.values()])
    new = AdapterConfig(
        method="dora" if magnitude else "lora",
        rank=largest,
        alpha=largest,
        targets=tuple(layer for layer in layers if ranks[layer]),
        magnitude_only=tuple(layer for layer in layers if not ranks[layer]),
        rank_overrides={layer: rank for layer, rank in ranks.items() if rank not in (0, largest)},
        alpha_overrides={layer: rank for layer, rank in ranks.items() if rank not in (0, largest)},
        magnitude_axis=next((c.magnitude_axis for c in configs if c.has_magnitude), "output"),
        embedding_magnitude=next((c.embedding_magnitude for c in configs if c.has_magnitude), "token"),
        seed=config.seed,
    )
    alphas = {layer: float(max(1, rank)) for layer, rank in ranks.items()}
    with room_for(model, name):
        attach_selection(model, new, Selection(ranks, alphas), trainable=True, loading=True)
        record_of(model).name = name
    for layer, module in adapters(model):
        A, B, g = pairs[layer]
        if A is not None:
            module.lora_A.copy_(A)
            module.lora_B.copy_(B)
        module.adapted.changed()
        if module.adapted.magnitude:
            module.magnitude.copy_(g * module.adapted.n(module.magnitude.dtype))
            module.adapted.changed()
    return whole


def combined(parts: dict[str, AdaptedWeight], weights: dict[str, float]) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(A, B, g) of one layer: parts: name → its weight there."""
    first = next(iter(parts.values()))
    dtype = first.facts.w2.dtype
    inside = [_low_rank(weight, weights[name], dtype) for name, weight in parts.items() if weight.magnitude]
    outside = [_low_rank(weight, weights[name], dtype) for name, weight in parts.items() if not weight.magnitude]
    some = next((weight for weight in parts.values() if weight.magnitude), None)
    if some is None:
        return (*_joined(outside), torch.ones(()))
    w = some.facts.w2.sqrt()
    m = w + sum(weights[name] * (weight.m().to(dtype) - w) for name, weight in parts.items() if weight.magnitude)
    A, B = _joined(inside)
    terms = some.norm_of(A, B)
    g = torch.where(some.facts.directionless, 1.0, m / terms)
    if outside and (g == 0).any():
        raise UserError("a magnitude of 0 leaves no direction that an adapter without one could be added to; change the weights")
    return (*_joined([*inside, *(_over(pair, g, some.axis) for pair in outside)]), g)


def on_the_line(parts: dict[str, AdaptedWeight], weights: dict[str, float]) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(A, B, γ) of one layer for W + t·(W′ − W)."""
    ((name, weight),) = parts.items()
    t, dtype = weights[name], weight.facts.w2.dtype
    A, B = _low_rank(weight, t, dtype)
    if not weight.magnitude:
        return A, B, torch.ones(())
    full_A, full_B = _low_rank(weight, 1.0, dtype)
    g = torch.where(weight.facts.directionless, 1.0, weight.m().to(dtype) / weight.norm_of(full_A, full_B))
    scale = 1 - t + t * g
    if (scale.abs() < 1e-6).any():
        raise UserError(f"t is {t}: the scale 1 - t + t·g of a row is 0, so that nothing of its direction is left; take another t")
    return (*_over((A, B), scale / g, weight.axis), scale) if A is not None else (None, None, scale)


def _low_rank(weight: AdaptedWeight, t: float, dtype) -> tuple[Tensor | None, Tensor | None]:
    """(A, t·s·B), in the precision of the magnitude."""
    A, B = weight.low_rank()
    return (None, None) if A is None else (A.to(dtype), t * weight.scaling * B.to(dtype))


def _joined(pairs: list) -> tuple[Tensor | None, Tensor | None]:
    pairs = [(A, B) for A, B in pairs if A is not None]
    return (torch.cat([A for A, _ in pairs], -2), torch.cat([B for _, B in pairs], -1)) if pairs else (None, None)


def _over(pair, g: Tensor, axis: str) -> tuple[Tensor | None, Tensor | None]:
    """The pair of ΔV / g along the axis."""
    A, B = pair
    if A is None:
        return pair
    return (A, B / g.unsqueeze(-1)) if axis == "output" else (A / g.unsqueeze(-2), B)


def _parts(model: nn.Module, weights: dict[str, float]) -> tuple[dict[str, dict[str, nn.Module]], list[AdapterConfig]]:
    """(layer → adapter → the layer with it), their configurations."""
    every = {name: layers_of(model, name) for name in weights}
    configs = [record_named(model, name).config for name in weights]
    for name in weights:
        if record_named(model, name).also_train:
            raise UserError(f"adapter {name!r} trains whole modules too (also_train), which cannot be combined; use it by itself")
    for setting in ("magnitude_axis", "embedding_magnitude"):
        if len(values := {getattr(c, setting) for c in configs if c.has_magnitude}) > 1:
            raise UserError(
                f"{setting} of these adapters is {' and '.join(sorted(values))}; those that are combined must have the same"
            )
    stacked = {layer for each in every.values() for layer, module in each.items() if module.adapted.kind.stacked}
    if stacked:
        raise UserError(f"{listed(sorted(stacked))}: the adapters of experts cannot be combined; use one by itself")
    order = [layer for layer in dict(named_layers(model)) if any(layer in shadows for shadows in every.values())]
    return {layer: {n: shadows[layer] for n, shadows in every.items() if layer in shadows} for layer in order}, configs


def _check_weights(model: nn.Module, weights) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"weights is {weights!r}; expected a mapping from names of adapters to numbers")
    for name, t in weights.items():
        check_known(model, name)
        if isinstance(t, bool) or not isinstance(t, int | float) or not abs(t) < float("inf"):
            raise UserError(f"the weight of {name!r} is {t!r}; expected a number")
