"""Where a frozen weight lives, one file a storage: what the maths and merging ask of it is `Base`.

A base sees every layer kind as one matrix W (O, I). Nothing else in the package reads a weight, and nobody asks for a storage's
name: what it can do is declared. Files in this folder are found by themselves; a storage of your own is made known with `add`,
a module of which only the forward is known with `register`.

    dense.py          plain tensors
    quantized.py      what quantized storages share: row tiles, a trial of the forward
    bitsandbytes.py   nf4, fp4, int8
    torchao.py        int8, intx, float8
    hqq.py            HQQ
    opaque.py         GPTQ, AWQ, and whatever is registered: only the forward is known
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import UserError

TILE_NUMBERS = 2**20
"""Numbers in one row tile: 4 MiB of fp32, the largest copy of any part of W that is ever made."""


class Base:
    """What a frozen weight offers. `module` is the adapted layer. Subclasses declare and override."""

    name: str
    rank = 50
    """Storages are asked in this order; the first that matches holds the weight."""
    writable = False
    """Is W a plain tensor, which merging overwrites in place? Else a dense layer takes the layer's place, or `requantized`."""
    exact_forward = True
    """False where the forward rounds activations too: U then comes from row tiles."""
    has_gradient = True
    """False where autograd does not see the layer's input: its gradient is then `backward_rows`."""

    def __init__(self, kind):
        self.kind = kind

    @classmethod
    def of(cls, kind, module: nn.Module) -> Base | None:
        """The storage of this module's weight, or None."""
        return cls(kind) if cls.matches(kind, module) else None

    @staticmethod
    def matches(kind, module: nn.Module) -> bool:
        raise NotImplementedError

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(O, I) as the maths sees it."""
        raise NotImplementedError

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype in which products with W are computed."""
        raise NotImplementedError

    def device(self, module: nn.Module) -> torch.device:
        raise NotImplementedError

    def version(self, module: nn.Module) -> tuple:
        """A value that changes when W does: what was derived from W is kept under it."""
        raise NotImplementedError

    def held(self, module: nn.Module) -> object:
        """What keeps W's memory its own while something derived from W is kept."""
        raise NotImplementedError

    def trained(self, module: nn.Module) -> bool:
        """Is W itself being trained?"""
        return False

    def forward_rows(self, module: nn.Module, rows_KI: Tensor) -> Tensor:
        """rows · Wᵀ (K, O): the layer's own forward, bias off, autocast off, in W's dtype."""
        raise NotImplementedError

    def backward_rows(self, module: nn.Module, rows_KO: Tensor) -> Tensor:
        """rows · W (K, I): the layer's own input gradient for K rows."""
        raise NotImplementedError

    def row_tiles(self, module: nn.Module, rows: Tensor | None = None) -> Iterator[tuple[Tensor | slice, Tensor]]:
        """(which rows, those rows of W in fp32 or fp64), tile by tile; all rows, or those in the index `rows`."""
        raise NotImplementedError

    def write_rows(self, module: nn.Module, rows: slice, tile_KI: Tensor) -> None:
        """Overwrite rows of W (merging), where it is `writable`."""
        raise TypeError(f"a {self.name} weight cannot be written row by row; see `requantized`")

    def adopt(self, module: nn.Module) -> None:
        """The layer gets an adapter: called once, before its class changes."""

    def release(self, module: nn.Module) -> None:
        """Undo `adopt`."""

    def trial(self, module: nn.Module) -> str | None:
        """Why the layer cannot be adapted, tried on one tile, or None; finds out whether its forward is exact."""
        return None

    def requantize_refusal(self, module: nn.Module) -> str | None:
        """Why a merged weight cannot be stored as W is, or None."""
        return f"no way back into {self.name} is known"

    def requantized(self, module: nn.Module, weight_OI: Tensor) -> None:
        """Store a dense weight as W is stored, in new tensors: those of W stay as they are."""
        raise NotImplementedError


_added: list[type[Base]] = []
"""Storages of a user's own: which kinds there are, not what a model uses."""

_NEEDED = ("shape", "dtype", "device", "version", "held", "forward_rows", "backward_rows", "row_tiles")


def add(storage: type[Base]) -> type[Base]:
    """Make a storage known; it is asked before all others. Also a decorator.

    Raises:
        UserError: something that every storage needs is not defined; it is named.
    """
    where = f"storage {getattr(storage, 'name', storage.__name__)!r}"
    if not getattr(storage, "name", None):
        raise UserError(f"{where} has no name; set the class attribute name")
    if missing := [name for name in ("matches", *_NEEDED) if getattr(storage, name) is getattr(Base, name)]:
        raise UserError(f"{where} does not define {', '.join(missing)}; see doratune.bases.Base")
    if any(known.name == storage.name and known is not storage for known in (*_added, *_built_in())):
        raise UserError(f"{where}: there is a storage of that name; choose another")
    if storage not in _added:
        _added.append(storage)
    return storage


def _built_in() -> list[type[Base]]:
    """The storages of this folder, in the order in which they are asked."""
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    return sorted((s for module in modules for s in getattr(module, "STORAGES", ())), key=lambda storage: storage.rank)


def base_of(kind, module: nn.Module) -> Base | None:
    """The storage that holds this module's weight, or None: one that is not known here."""
    return next((base for storage in (*_added, *_built_in()) if (base := storage.of(kind, module)) is not None), None)


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
