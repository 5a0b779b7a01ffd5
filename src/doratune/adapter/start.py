"""What an adapter starts from: A and B from another start than B = 0, and m from the weight that is then in effect.

    start      zero, pissa, olora, loftq (`directions/starts.py`)
    m          |W + s·B·A| of the frozen weight and the start, so that g = 1 (§3.1); or |W₀| of the unquantized weight W₀ on request

Cost: one pass over W; a start reads W some ten times in row tiles.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..bases import TILE_NUMBERS
from ..directions.starts import put_start
from ..errors import UserError
from ..layers import kind_of
from ..layers.shares import first_magnitude, is_share
from ..layers.weight import AdaptedWeight
from ..layers.wrappers import module_at
from ..math import decomposition


def of_layer(weight: AdaptedWeight, config, seed: int, name: str, original) -> Tensor | None:
    """`magnitude_and_start` of each matrix of a layer: m (O,), or (E, O) for experts."""
    parts = weight.matrices()
    first = [magnitude_and_start(part, config, seed + i, name, original) for i, part in enumerate(parts)]
    return first[0] if parts[0] is weight else None if first[0] is None else torch.stack(first)


@torch.no_grad()
def magnitude_and_start(weight: AdaptedWeight, config, seed: int, name: str, original) -> Tensor | None:
    """Put the configured start into the weight's factors; returns m at the start, None without a magnitude."""
    if is_share(W := weight.stored()):  # from the start "zero"
        return first_magnitude(weight, W) if weight.magnitude else None
    w2 = weight.facts.w2
    if weight.rank and config.start != "zero":
        tiles = weight.row_tiles
        if config.start == "loftq":
            lost = original_weight(original, name, weight.shape, config)
            tiles = partial(_residual, tiles, lost)
        put_start(
            dict(zip(weight.direction.names, weight.parameters(weight.direction.names), strict=True)),
            config.start,
            tiles,
            weight.scaling,
            seed,
        )
    if not weight.magnitude:
        return None
    if config.magnitude_from == "original":
        W = original_weight(original, name, weight.shape, config)
        w2 = decomposition.squared_norms(_tiles(W, w2.dtype), len(w2), weight.axis, w2.dtype, w2.device)
    elif weight.rank and config.start == "loftq":
        A, B = weight.low_rank()
        return weight.terms(A.to(weight.dtype), B.to(weight.dtype)).n
    return w2.sqrt()


def needs_original(config) -> bool:
    return config.start == "loftq" or config.magnitude_from == "original"


def original_weight(original, name: str, shape: tuple[int, int], config) -> Tensor:
    """The unquantized weight (O, I) of one module.

    Raises:
        UserError: none was given, or one of another shape.
    """
    if original is None:
        why = "start is 'loftq'" if config.start == "loftq" else "magnitude_from is 'original'"
        raise UserError(f"{why}, which needs the unquantized weights; pass doratune.attach(..., original=unquantized_model)")
    try:
        W = _matrix_of(module_at(original, name)) if isinstance(original, nn.Module) else original(name)
    except (AttributeError, KeyError):
        W = None
    if not isinstance(W, Tensor):
        raise UserError(f"the original model has no weight named {name}; pass the unquantized model of the same names")
    if tuple(W.shape) != tuple(shape):
        raise UserError(f"{name}: the original weight has shape {tuple(W.shape)}, the quantized one {tuple(shape)}")
    return W.detach()


def _matrix_of(module: nn.Module) -> Tensor | None:
    """W (O, I) of a module that need not be of the adapted layer's class (a quantized Conv1D is a linear layer)."""
    kind = kind_of(module)
    base = None if kind is None else kind.base(module)
    return None if base is None or not base.writable else base.matrix(module)


def _tiles(W_OI: Tensor, dtype: torch.dtype):
    step = max(1, TILE_NUMBERS // max(1, W_OI.shape[1]))
    for start in range(0, len(W_OI), step):
        rows = slice(start, min(start + step, len(W_OI)))
        yield rows, W_OI[rows].to(dtype)


def _residual(tiles, original: Tensor):
    """Row tiles of W₀ − W."""
    for rows, tile in tiles():
        yield rows, original[rows].to(tile) - tile
