"""Factors in other forms, all exact: LoHa and LoKr as A and B, Tucker's core folded into A, one rank and one scaling for all.

    LoHa   (B₁A₁) ⊙ (B₂A₂) as a pair of rank R²            LoKr   C ⊗ (B₂A₂) as a pair of rank (columns of C)·R
    Tucker W[o, i, k…] = Σ up[o, p]·core[p, q, k…]·down[q, i]:  A = core ×₂ down, B = up

Cost: the new factors.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from ..directions import direction_of
from .neutral import NeutralAdapter, NeutralLayer


def with_core(core: Tensor, down: Tensor) -> Tensor:
    """Tucker's core (R, R, k…) and down (R, I) as filters (R, I, k…)."""
    return torch.einsum("pq...,qi->pi...", core.float(), down.flatten(1).float())


def kronecker(w1: Tensor, w2_a: Tensor, w2_b: Tensor) -> dict[str, Tensor]:
    """C ⊗ (B₂A₂) in LoKr's own tensors where our split of (O, I) is the file's, else as A and B."""
    shape = len(w1) * len(w2_a), w1.shape[1] * w2_b.shape[1]
    direction, own = direction_of("lokr"), {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b}
    fits = all(tuple(own[name].shape) == size for name, size in direction.shapes(shape, len(w2_b)).items())
    if fits and direction.refusal(shape, len(w2_b)) is None:
        return own
    A, B = direction.factors(tuple(t.float() for t in own.values()), shape)
    if len(w1) < w1.shape[1]:  # C = 1·C: fewer rows than columns
        one = torch.eye(len(w1))
        A, B = torch.kron(w1.float(), w2_b.float()), torch.kron(one, w2_a.float())
    return {"lora_A": A, "lora_B": B}


def as_pair(layer: NeutralLayer) -> NeutralLayer:
    """The same layer with A and B."""
    if layer.direction == "lora":
        return layer
    direction = direction_of(layer.direction)
    tensors = tuple(layer.factors[name].float() for name in direction.names)
    A, B = direction.factors(tensors, ())
    return NeutralLayer({"lora_A": A, "lora_B": B}, layer.scaling, layer.magnitude, layer.axis)


def one_direction(layers: dict[str, NeutralLayer]) -> dict[str, NeutralLayer]:
    """As they are where all have one direction, else all with A and B."""
    if len({layer.direction for layer in layers.values()}) == 1:
        return layers
    return {name: as_pair(layer) for name, layer in layers.items()}


def shaped(layers: dict[str, NeutralLayer], model) -> dict[str, NeutralLayer]:
    """With the A and B of convolutions as filters (R, I, k…) and (O, R, 1…), where the model (`ModelNames`) says which they are."""
    filters = dict(layers)
    for name, layer in layers.items():
        kernel = model.kernels.get(name) if model is not None else None
        if kernel and "lora_A" in layer.factors and layer.factors["lora_A"].dim() == 2:
            A, B = layer.factors["lora_A"], layer.factors["lora_B"]
            factors = {"lora_A": A.reshape(-1, *kernel), "lora_B": B.reshape(*B.shape, *[1] * (len(kernel) - 1))}
            filters[name] = replace(layer, factors=factors)
    return filters


def uniform(adapter: NeutralAdapter) -> tuple[dict[str, NeutralLayer], int, float]:
    """(layers, rank, scaling), the same for all: smaller ranks are padded with zeros, the rest of s goes into B."""
    rank = max(layer.rank for layer in adapter.layers.values())
    scaling = Counter(layer.scaling for layer in adapter.layers.values()).most_common(1)[0][0]
    layers = {}
    for name, layer in adapter.layers.items():
        first, second = ("embedding_A", "embedding_B") if layer.embedding else ("lora_A", "lora_B")
        A, B = layer.factors[first], layer.factors[second]
        if layer.scaling != scaling:
            B = B.float() * (layer.scaling / scaling)
        missing = rank - layer.rank
        if missing:
            A = torch.cat([A, A.new_zeros(missing, *A.shape[1:])])
            B = torch.cat([B, B.new_zeros(len(B), missing, *B.shape[2:])], 1)
        layers[name] = NeutralLayer({first: A, second: B}, scaling, layer.magnitude, layer.axis)
    return layers, rank, scaling
