"""Where a frozen weight lives, and the little that the maths asks of it: the `Base` protocol.

A base sees every layer kind as one matrix W (O, I). A new storage (a quantizer, a shard) is one new file here that
offers these methods; nothing else in the package reads a weight.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

TILE_NUMBERS = 2**20
"""Numbers in one row tile: 4 MiB of fp32, the largest copy of any part of W that is ever made."""


class Base(Protocol):
    """What a frozen weight must offer. `module` is the adapted layer."""

    name: str
    exact_forward: bool
    """False where the forward quantizes activations: U then comes from row tiles."""
    has_gradient: bool
    """False where autograd does not see the layer's input: its gradient is then `backward_rows`."""

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(O, I) as the maths sees it."""

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype in which products with W are computed."""

    def device(self, module: nn.Module) -> torch.device: ...

    def version(self, module: nn.Module) -> tuple:
        """A value that changes when W does: what was derived from W is kept under it."""

    def held(self, module: nn.Module) -> object:
        """What keeps W's memory its own while something derived from W is kept."""

    def forward_rows(self, module: nn.Module, rows_KI: Tensor) -> Tensor:
        """rows · Wᵀ (K, O): the layer's own forward, bias off, autocast off, in W's dtype."""

    def backward_rows(self, module: nn.Module, rows_KO: Tensor) -> Tensor:
        """rows · W (K, I): the layer's own input gradient for K rows."""

    def row_tiles(self, module: nn.Module, rows: Tensor | None = None) -> Iterator[tuple[Tensor | slice, Tensor]]:
        """(which rows, those rows of W in fp32 or fp64), tile by tile; all rows, or those in the index `rows`."""

    def write_rows(self, module: nn.Module, rows: slice, tile_KI: Tensor) -> None:
        """Overwrite rows of W (merging); dense storages only, the others have `requantized`."""

    def adopt(self, module: nn.Module) -> None:
        """The layer gets an adapter: called once, before its class changes."""

    def release(self, module: nn.Module) -> None:
        """Undo `adopt`."""

    def trial(self, module: nn.Module) -> str | None:
        """Why the layer cannot be adapted, tried on one tile, or None; finds out whether its forward is exact."""


def base_of(kind, module: nn.Module) -> Base | None:
    """The storage that holds this module's weight, or None: one that is not known here."""
    from . import bitsandbytes, dense, hqq, opaque, torchao

    if kind.name == "Linear" and (storage := opaque.storage_of(module)) is not None:
        return opaque.OpaqueBase(kind, storage)
    storages = (bitsandbytes.Bnb4bit, bitsandbytes.Bnb8bit, torchao.TorchaoBase, hqq.HQQBase, dense.DenseBase)
    return next((storage(kind) for storage in storages if storage.matches(kind, module)), None)


def is_opaque(module: nn.Module) -> bool:
    """Is this a linear layer of which only the forward is known to PyTorch?"""
    from . import hqq, opaque

    return hqq.is_hqq(module) or opaque.storage_of(module) is not None


def register(matches, *, rows=None, exact_forward: bool = True, name: str = "registered") -> None:
    """Make a quantized linear layer of your own known: see `bases.opaque.register`."""
    from . import opaque

    opaque.register(matches, rows=rows, exact_forward=exact_forward, name=name)


def dense_weight(base: Base, module: nn.Module, dtype: torch.dtype) -> Tensor:
    """W (O, I) as a new dense tensor, from row tiles."""
    weight = torch.empty(base.shape(module), dtype=dtype, device=base.device(module))
    for rows, tile in base.row_tiles(module):
        weight[rows] = tile.to(dtype)
    return weight


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for every low precision, fp64 for fp64: the dtype of m, n, g − 1 and of all sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
