"""Merge in memory: W' = g ⊙ (W + s·B·A) takes W's place (Eq. 5), the layer becomes an ordinary layer, and back, bit for bit.

Cost: 2·O·I·R FLOPs in fp32, in row tiles of 4 MiB; with `keep`, one exact copy of each adapted weight.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .attachment import adapters, record_of
from .errors import UserError
from .layers.adapted import Adapted, LayerSite, adapted_class
from .math.decomposition import gain_minus_one
from .math.norm import direct_rows

KEEP = ("cpu", "device", "none")


@torch.no_grad()
def merge(model: nn.Module, keep: str = "cpu") -> int:
    """Put the merged weights in place; layers become plain layers with zero added latency.

    Args:
        keep: where the bit-exact copy of each original weight lives: "cpu", "device", or "none" (unmerge then refuses).

    Returns:
        Bytes of the kept copies.

    Raises:
        UserError: nothing attached, merged already, a weight that would not be finite (nothing is then changed).
    """
    if keep not in KEEP:
        raise UserError(f"keep is {keep!r}; expected one of {', '.join(KEEP)}")
    record = record_of(model)
    if record.merged is not None:
        raise UserError("this model is merged already; call doratune.unmerge(model) first")
    layers = list(adapters(model))
    gains = {name: merged_gain(module) for name, module in layers}
    for name, module in layers:
        tensors = [gains[name], *(t for t in (module.lora_A, module.lora_B) if t is not None)]
        if not all(t is None or torch.isfinite(t).all() for t in tensors):
            raise UserError(f"{name}: the adapter holds NaN or infinite values; merging is refused, nothing was changed")
    merged, kept_bytes = {}, 0
    for name, module in layers:
        frozen = LayerSite(module, module.adaptation).frozen
        original = None if keep == "none" else _copy(module.weight, keep)
        kept_bytes += 0 if original is None else original.nbytes
        for rows, tile in merged_tiles(module, gains[name]):
            module.adaptation.base.write_rows(module, rows, tile)
        merged[name] = _to_plain(module, original, frozen)
    record.merged = merged
    return kept_bytes


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the original weights bit for bit and the adapter as it was.

    Raises:
        UserError: not merged, or merged with keep="none".
    """
    record = record_of(model)
    if record.merged is None:
        raise UserError("this model is not merged; there is nothing to unmerge")
    if any(stored.original is None for stored in record.merged.values()):
        raise UserError('merged with keep="none": no original weight was kept; load the base model again')
    for name, stored in record.merged.items():
        module = model.get_submodule(name)
        module.weight.copy_(stored.original)
        module.adaptation = stored.adaptation
        for key in ("lora_A", "lora_B", "magnitude"):
            p = getattr(stored, key)
            module.register_parameter(key, p if p is None else p.to(module.weight.device))
        module.__class__ = adapted_class(type(module))
        stored.adaptation.changed()
    record.merged = None


def merged_gain(module: Adapted) -> Tensor | None:
    """g − 1 in fp32 with A and B rounded as the unmerged forward in W's dtype rounds them; None without magnitude."""
    if module.magnitude is None:
        return None
    a, site = module.adaptation, LayerSite(module, module.adaptation)
    A, B = a.direction.factors(module)
    n = site.norm(A, B, a.base.dtype(module), 2**30)
    return gain_minus_one(module.magnitude, n, site.frozen)


def merged_tiles(module: Adapted, gain: Tensor | None):
    """(rows, W' rows in fp32) tile by tile."""
    a = module.adaptation
    A, B = a.direction.factors(module)
    dtype = a.base.dtype(module)
    if A is None:
        tiles = a.base.row_tiles(module)
    else:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tiles = direct_rows(a.base, module, A.to(dtype).to(wide), B.to(dtype).to(wide), a.scaling)
    for rows, V in tiles:
        if gain is None:
            yield rows, V
        else:
            yield rows, V + V * (gain if a.axis == "input" else gain[rows, None])


def _copy(weight: Tensor, keep: str) -> Tensor:
    return weight.detach().to("cpu", copy=True) if keep == "cpu" else weight.detach().clone()


def _to_plain(module: Adapted, original: Tensor | None, frozen: Tensor) -> SimpleNamespace:
    """Make the layer an ordinary one; its adapter goes into the record."""
    a = module.adaptation
    stored = SimpleNamespace(
        **{key: module._parameters.pop(key) for key in ("lora_A", "lora_B", "magnitude")},
        scaling=a.scaling,
        adaptation=a,
        original=original,
        frozen=frozen,
    )
    del module.adaptation
    module.__class__ = type(module).__mro__[2]
    return stored
