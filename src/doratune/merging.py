"""Merge in memory: W' = g ⊙ (W + s·B·A) takes W's place (Eq. 5), the layer becomes an ordinary layer, and back, bit for bit.

Cost: 2·O·I·R FLOPs in fp32, in row tiles of 4 MiB; with `keep`, one exact copy of each adapted weight.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .attachment import adapters, put_on, record_of, take_off
from .errors import UserError
from .layers.adapted import Adapted, own_parameters
from .layers.site import LayerSite
from .math.compose import no_autocast
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
    layers, merged = list(adapters(model)), {}
    with no_autocast(next(model.parameters()).device):
        gains = {name: checked_gain(name, module) for name, module in layers}
        try:
            for name, module in layers:
                merged[name] = _merge_layer(module, gains[name], keep)
        except BaseException:
            for name, stored in merged.items():
                if stored.original is not None:
                    _restore(model.get_submodule(name), stored)
            raise
    record.merged = merged
    return sum(stored.original.nbytes for stored in merged.values() if stored.original is not None)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the original weights bit for bit and the adapter as it was; a move or dtype change meanwhile is kept.

    Raises:
        UserError: not merged, or merged with keep="none".
    """
    record = record_of(model)
    if record.merged is None:
        raise UserError("this model is not merged; there is nothing to unmerge")
    if any(stored.original is None for stored in record.merged.values()):
        raise UserError('merged with keep="none": no original weight was kept; load the base model again')
    for name, stored in record.merged.items():
        _restore(model.get_submodule(name), stored)
    record.merged = None


def checked_gain(name: str, module: Adapted) -> Tensor | None:
    """g − 1 of a layer whose merged weight is finite.

    Raises:
        UserError: NaN or infinite values in the adapter, or a result beyond the weight's dtype (fp16).
    """
    gain = merged_gain(module)
    if any(not torch.isfinite(t).all() for t in (gain, *own_parameters(module).values()) if t is not None):
        raise UserError(f"{name}: the adapter holds NaN or infinite values; merging is refused, nothing was changed")
    dtype = module.adaptation.base.dtype(module)
    if dtype == torch.float16 and not all(torch.isfinite(tile.to(dtype)).all() for _, tile in merged_tiles(module, gain)):
        raise UserError(f"{name}: the merged weight overflows float16; merging is refused, nothing was changed: use bfloat16")
    return gain


def _merge_layer(module: Adapted, gain: Tensor | None, keep: str) -> SimpleNamespace:
    """Write one layer's merged weight and make it a plain layer; returns its stored adapter."""
    a = module.adaptation
    frozen = a.frozen_facts(module).directionless
    weight = a.base.weight(module).detach()
    original = None if keep == "none" else weight.to("cpu", copy=True) if keep == "cpu" else weight.clone()
    seen = {"lora_A": module.lora_A, "lora_B": module.lora_B, "magnitude": module.magnitude}
    for rows, tile in merged_tiles(module, gain):
        a.base.write_rows(module, rows, tile)
    own = take_off(module)
    return SimpleNamespace(**(seen | own), own=own, scaling=a.scaling, adaptation=a, original=original, frozen=frozen)


def _restore(module: nn.Module, stored: SimpleNamespace) -> None:
    """Undo `_merge_layer`; where the model changed its dtype meanwhile, the original weight and m follow as `.to` does."""
    weight = stored.adaptation.base.weight(module)
    dtype, device = weight.dtype, weight.device
    if dtype == stored.original.dtype and device.type != "meta":
        weight.copy_(stored.original)
    else:
        weight.data = stored.original.to(device)
    for p in stored.own.values():
        if p is not None:
            p.data = p.data.to(device)
    put_on(module, stored.adaptation, stored.own)
    stored.adaptation.changed()
    if dtype != stored.original.dtype:
        module.to(dtype)


def merged_gain(module: Adapted) -> Tensor | None:
    """g − 1 in fp32 with A and B rounded as the unmerged forward in W's dtype rounds them; None without magnitude."""
    if module.magnitude is None:
        return None
    a, site = module.adaptation, LayerSite(module, module.adaptation)
    A, B = a.factors_of(module)
    n = site.norm(A, B, a.base.dtype(module), 2**30)
    return gain_minus_one(module.magnitude, n, site.frozen)


def merged_tiles(module: Adapted, gain: Tensor | None):
    """(rows, W' rows in fp32) tile by tile."""
    a = module.adaptation
    A, B = a.factors_of(module)
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
