"""The tensors of a model folder, or of base + adapter, one at a time: what every export reads.

W' comes from the same code as `doratune merge` (checkpoint/merge.py), in fp32 and not rounded to the base's dtype. Cost: memory of
one tensor; the base is read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.base_check import refuse_other_checkpoint
from ..checkpoint.merge import Plan, base_folder, list_shards, make_plan, merged_shard
from ..checkpoint.quantized import recorded_quantization
from ..errors import UserError
from ..support.files import open_tensors


@dataclass
class Weights:
    """Names, shapes and values of a model's tensors.

    Raises:
        UserError: no safetensors folder, a quantized base, an adapter of a quantized base, of another base (`check_base`), or one
            that does not fit.
    """

    base: str
    adapter: str | Path | None = None
    check_base: bool = True
    folder: Path = field(init=False)
    shards: dict[str, list[str]] = field(init=False)
    plan: Plan | None = field(init=False, default=None)

    def __post_init__(self):
        if self.adapter is not None and recorded_quantization(self.adapter):
            raise UserError(
                f"{self.adapter} was trained on a quantized base, whose rounded weights it belongs to: write those first with "
                f"doratune merge --adapter {self.adapter} --output MODEL, then export --model MODEL"
            )
        self.folder = base_folder(self.base)
        self.shards = list_shards(self.folder)
        if self.adapter is not None:
            self.plan = make_plan(self.folder, Path(self.adapter), self.names)
            if self.check_base:
                refuse_other_checkpoint(self.plan, self.stored, self.adapter)

    @property
    def names(self) -> set[str]:
        return {key for keys in self.shards.values() for key in keys}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{key: shape} in the order in which `__iter__` yields; nothing is read but the files' heads."""
        shapes = {}
        for shard, keys in self.shards.items():
            with open_tensors(self.folder / shard) as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in keys}
        replaced = self.plan.replaced if self.plan else {}
        shapes |= {key: tuple(t.shape) for key, t in replaced.items()}
        return shapes | {peer: shapes[key] for peer, key in (self.plan.untied if self.plan else {}).items()}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor): adapted weights in fp32, all others as they are stored."""
        for shard, keys in self.shards.items():
            if self.plan is None:
                with open_tensors(self.folder / shard) as file:
                    yield from ((key, file.get_tensor(key)) for key in keys)
            else:
                for key in keys:
                    yield from merged_shard(self.folder / shard, [key], self.plan, self._dtype(key))
        if self.plan is not None:
            names = self.names
            yield from ((key, t) for key, t in self.plan.replaced.items() if key not in names)
            for peer, key in self.plan.untied.items():
                yield peer, self.stored(key)

    def _dtype(self, key: str) -> torch.dtype | None:
        return torch.float32 if key in self.plan.merged or key in self.plan.replaced else None

    def stored(self, key: str) -> Tensor:
        """A tensor of the base as it is stored."""
        shard = next((shard for shard, keys in self.shards.items() if key in keys), None)
        if shard is None:
            raise UserError(f"{self.folder} holds no tensor {key}")
        with open_tensors(self.folder / shard) as file:
            return file.get_tensor(key)

    @property
    def untied(self) -> bool:
        """Does the adapter hold an embedding or head of its own, so that the two are no longer one tensor?"""
        return self.plan is not None and bool(self.plan.untied or set(self.plan.replaced) - self.names)
