"""Where a frozen weight lives, one file a storage: what the maths and merging ask of it is `Base`.

A base sees every layer kind as one matrix W (O, I). Nothing else in the package reads a weight, and nobody asks for a storage's
name: what it can do is declared. Files in this folder are found by themselves; a storage of your own is made known with `add`
(`tests/bases/test_own_base.py` has one, docs/layers.md explains it), a module of which only the forward is known with `register`.

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
from abc import abstractmethod
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from ..errors import UserError

TILE_NUMBERS = 2**20
"""Numbers in one row tile: 4 MiB of fp32, the largest copy of any part of W that is ever made."""


class Base:
    """What a frozen weight offers. `module` is the adapted layer. Subclasses declare and override; what is abstract they must."""

    name: str
    modules: tuple[type[nn.Module], ...] = ()
    """Classes of linear layers whose weight it holds, nn.Linear's or not: with `in_features`, `out_features` and a forward
    x·Wᵀ + bias. Or `matches` is overridden."""
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

    @classmethod
    def matches(cls, kind, module: nn.Module) -> bool:
        return kind.may_be_quantized and isinstance(module, cls.modules)

    @classmethod
    def makes_linear(cls, module: nn.Module) -> bool:
        """Is this a linear layer, also where it is no nn.Linear?"""
        return isinstance(module, cls.modules)

    @abstractmethod
    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(O, I) as the maths sees it."""
        raise NotImplementedError

    @abstractmethod
    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype in which products with W are computed."""
        raise NotImplementedError

    def model_dtype(self, module: nn.Module) -> torch.dtype | None:
        """The dtype of the model around it, where the storage tells it."""
        return self.dtype(module)

    @abstractmethod
    def device(self, module: nn.Module) -> torch.device:
        raise NotImplementedError

    @abstractmethod
    def version(self, module: nn.Module) -> tuple:
        """A value that changes when W does: what was derived from W is kept under it."""
        raise NotImplementedError

    @abstractmethod
    def held(self, module: nn.Module) -> object:
        """What keeps W's memory its own while something derived from W is kept."""
        raise NotImplementedError

    def trained(self, module: nn.Module) -> bool:
        """Is W itself being trained?"""
        return False

    @abstractmethod
    def forward_rows(self, module: nn.Module, rows_KI: Tensor) -> Tensor:
        """rows · Wᵀ (K, O): the layer's own forward, bias off, autocast off, in W's dtype."""
        raise NotImplementedError

    @abstractmethod
    def backward_rows(self, module: nn.Module, rows_KO: Tensor) -> Tensor:
        """rows · W (K, I): the layer's own input gradient for K rows."""
        raise NotImplementedError

    @abstractmethod
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


def add(storage: type[Base]) -> type[Base]:
    """Make a storage known; it is asked before all others. Also a decorator. One that was added under the same name is replaced.

    Raises:
        UserError: something that every storage needs is not defined; it is named.
    """
    if not isinstance(storage, type) or not issubclass(storage, Base):
        raise UserError(f"{storage!r} is no storage: expected a subclass of doratune.bases.Base")
    where = f"storage {getattr(storage, 'name', storage.__name__)!r}"
    if not isinstance(vars(storage).get("name"), str):
        raise UserError(f"{where} has no name of its own; set the class attribute name")
    missing = [name for name in dir(storage) if getattr(getattr(storage, name), "__isabstractmethod__", False)]
    if not storage.modules and all(_function(storage, name) is _function(Base, name) for name in ("matches", "of")):
        missing.insert(0, "modules")
    if missing:
        raise UserError(f"{where} does not define {', '.join(missing)}; see doratune.bases.Base")
    if any(known.name == storage.name for known in _built_in()):
        raise UserError(f"{where}: there is a storage of that name; choose another")
    remove(storage.name)
    _added.append(storage)
    return storage


def _function(storage: type[Base], name: str):
    method = getattr(storage, name)
    return getattr(method, "__func__", method)


def remove(name: str) -> None:
    """Forget a storage that was added; layers that have it keep it."""
    _added[:] = [storage for storage in _added if storage.name != name]


@cache
def _built_in() -> tuple[type[Base], ...]:
    """The storages of this folder, in the order in which they are asked."""
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    return tuple(sorted((s for module in modules for s in getattr(module, "STORAGES", ())), key=lambda storage: storage.rank))


def base_of(kind, module: nn.Module) -> Base | None:
    """The storage that holds this module's weight, or None: one that is not known here."""
    return next((base for storage in (*_added, *_built_in()) if (base := storage.of(kind, module)) is not None), None)


def is_opaque(module: nn.Module) -> bool:
    """Is this a linear layer, although it is no nn.Linear: one that some storage says is?"""
    return any(storage.makes_linear(module) for storage in (*_added, *_built_in()))


def identity(tensors) -> tuple:
    """Changes when one of the tensors is another one or was written to."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors)


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
