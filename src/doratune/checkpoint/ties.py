"""Parameters that are tied in the base: which key of a checkpoint stands for them, and which were changed apart from their peers.

Cost: walks over the names of a model without memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..support.headers import Keys


def tied_to(skeleton: nn.Module, whole: set[str]) -> dict[str, list[str]]:
    """Trained or merged parameter → the names of others that are tied to it in the base and are neither: they keep the base's
    values."""
    return {key: [n for n in same if n not in whole] for same in _together(skeleton) for key in same if key in whole}


def keep_ties(skeleton: nn.Module, replaced: dict[str, Tensor], keys: set[str]) -> None:
    """Drop trained parameters that the checkpoint lacks where they are tied to one that it has, and were trained as one with it."""
    for same in _together(skeleton):
        stored = next((name for name in same if name in replaced and name in keys), None)
        for name in same:
            if stored and name not in keys and name in replaced and torch.equal(replaced[name], replaced[stored]):
                del replaced[name]


def like_of(key: str, skeleton: nn.Module, files: Keys) -> str | None:
    """The checkpoint's key for what this parameter is tied to in the base."""
    p = skeleton.get_parameter(key)
    tied = [name for name, other in skeleton.named_parameters(remove_duplicate=False) if other is p]
    return next((found for name in tied if (found := files.find(name))), None)


def _together(skeleton: nn.Module) -> list[list[str]]:
    """The names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, p in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return list(names.values())
