"""Merged rows without a direction: W' = W + s·B·A there, where PEFT's m/n is 0/0.

PEFT leaves merging to the variant of each adapter (`lora_variant`): while a layer is merged or unmerged, variants stand around
PEFT's that put those rows right. All other rows are PEFT's, bit for bit. Cost: nothing where all rows have a direction, as nearly
always.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn


def without_direction(weight) -> Tensor | None:
    """Which rows (on the input axis: columns) of an adapted weight's W have no direction; None where all have one."""
    return None if weight is None else weight.facts.frozen


class SoundVariant:
    """PEFT's variant of one adapter, but for the rows in `still`."""

    def __init__(self, variant, still: Tensor):
        self.variant, self.still = variant, still

    def __getattr__(self, name: str):
        return getattr(self.variant, name)

    def merge_safe(self, module: nn.Module, adapter: str, before: Tensor) -> Tensor:
        start = before.clone()
        return self._mended(module, adapter, self.variant.merge_safe(module, adapter, before), start, 1)

    def merge_unsafe(self, module: nn.Module, adapter: str, before: Tensor) -> None:
        start = before.detach().clone()
        self.variant.merge_unsafe(module, adapter, before)
        before.data = self._mended(module, adapter, before.data, start, 1)

    def unmerge(self, module: nn.Module, adapter: str, merged: Tensor) -> Tensor:
        start = merged.detach().clone()
        return self._mended(module, adapter, self.variant.unmerge(module, adapter, merged), start, -1)

    def _mended(self, module: nn.Module, adapter: str, W: Tensor, start: Tensor, sign: int) -> Tensor:
        """W with start ± s·B·A in the rows in `still`."""
        along = 1 if _across(module) else 0
        still = self.still.to(W.device).view([-1 if dim == along else 1 for dim in range(W.dim())])
        return torch.where(still, (start + sign * module.get_delta_weight(adapter)).to(W.dtype), W)


def _across(module: nn.Module) -> bool:
    """Does the magnitude lie along the second dimension of the stored weight?"""
    return bool(getattr(module, "fan_in_fan_out", False)) or hasattr(module, "_embed")


@contextlib.contextmanager
def sound_variants(module: nn.Module, still: Tensor | None):
    """Let merging and unmerging put the rows in `still` right."""
    own = module.lora_variant
    if still is None or any(isinstance(variant, SoundVariant) for variant in own.values()):
        yield
        return
    before = dict(own)
    own.update({name: SoundVariant(variant, still) for name, variant in before.items() if name in module.lora_magnitude_vector})
    try:
        yield
    finally:
        own.update(before)
