"""The layers of an adapter on their base, one at a time, as matrices: what exports and extraction compute with.

Only W and the factors of one layer are in memory at once (fp32): the model is built without memory, its weights are read from the
checkpoint. Cost: one pass over the adapted weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter.layer import adapt, take_off
from ..adapter.merge import checked_norm, merged_tiles
from ..checkpoint.fitting import put_layer
from ..checkpoint.merge import Plan
from ..errors import UserError
from ..layers import kind_of
from ..layers.layouts import layer_at
from ..math.autograd import no_autocast
from .weights import Weights


@dataclass(frozen=True)
class AdaptedMatrix:
    """One adapted layer: W (O, I), and W' = g ⊙ (W + s·B·A), in fp32.

    `g` (O,) is 1 on rows without direction and of an adapter without magnitude; None on the input axis. A (K, I), B (O, K) or None
    (magnitude only)."""

    name: str
    kind: object
    axis: str
    scaling: float
    W: Tensor
    merged: Tensor
    A: Tensor | None
    B: Tensor | None
    g: Tensor | None


def adapted_layers(weights: Weights) -> Iterator[AdaptedMatrix]:
    """Every adapted layer of base + adapter, in the model's order.

    Raises:
        UserError: a layer whose weight is a batch of matrices (experts), or values that are not finite.
    """
    plan = weights.plan
    keys = {name: key for key, name in plan.merged.items()}
    for name in plan.selection.ranks:
        if kind_of(layer_at(plan.skeleton, name)).stacked:
            raise UserError(f"{name} is a batch of expert matrices; export one weight for each, or merge: doratune merge")
        weight = plan.base.get(keys[name])  # a base weight that came with the adapter
        yield _matrix(plan, name, weights.stored(keys[name]) if weight is None else weight)


@torch.no_grad()
def _matrix(plan: Plan, name: str, weight: Tensor) -> AdaptedMatrix:
    module = plan.skeleton.get_submodule(name)
    kind, own = kind_of(module), module._parameters
    empty, bias = own[kind.weight_name], own.get(kind.bias_name)
    own[kind.weight_name] = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
    own |= {kind.bias_name: None} if bias is not None else {}
    try:
        ranks, alphas = plan.selection.ranks, plan.selection.alphas
        adapt(module, name, plan.config, ranks[name], alphas[name], trainable=False, common=plan.common)
        put_layer(name, module, plan.tensors)
        adapted = module.adapted
        with no_autocast(adapted.device):
            n, m = checked_norm(name, adapted), adapted.m()
            merged = torch.cat([tile for _, tile in merged_tiles(adapted, n)])
        A, B = (None if t is None else t.detach().float().clone() for t in adapted.low_rank())
        W, gain = kind.matrix(own[kind.weight_name].data).flatten(1).clone(), None
        if adapted.axis == "output":
            gain = torch.ones(len(W)) if m is None else m / n
            gain = gain if adapted.facts.frozen is None else gain.masked_fill(adapted.facts.frozen, 1.0)
        axis, scaling = adapted.axis, adapted.scaling
        take_off(module)
    finally:
        own[kind.weight_name] = empty
        own |= {kind.bias_name: bias} if bias is not None else {}
    return AdaptedMatrix(name, kind, axis, scaling, W, merged, A, B, gain)
