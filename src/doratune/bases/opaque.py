"""Any module with `in_features`, `out_features` and a forward y = x·Wᵀ + bias: GPTQ, AWQ, and what a user registers.

Without a function that dequantizes rows, the forward itself is asked for them:

    with a gradient        W[rows] = one-hot output gradients through the layer, one row of W for each
    without                W[:, columns] = the outputs of one-hot inputs

Cost of that: a row tile of K rows takes a forward and a backward of K rows (2·O·I·K FLOPs each), so all of W 4·O²·I, read once
at attach: a third of a second for 7·10⁹ weights at 300 TFLOP/s, minutes on a CPU. Without a gradient every tile takes a forward
of I rows. A `rows` function given to `register` costs one dequantization.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from . import TILE_NUMBERS
from .quantized import QuantizedBase


@dataclass(frozen=True, eq=False)
class Storage:
    """One kind of opaque module; known by its name, also in pickled models."""

    name: str
    matches: Callable[[nn.Module], bool]
    rows: Callable[[nn.Module, Tensor | slice], Tensor] | None = None
    exact_forward: bool = True

    def __reduce__(self):
        return storage_named, (self.name,)


REGISTERED: dict[str, Storage] = {}


def register(
    matches: Callable[[nn.Module], bool],
    *,
    rows: Callable[[nn.Module, Tensor | slice], Tensor] | None = None,
    exact_forward: bool = True,
    name: str = "registered",
) -> None:
    """Make a quantized linear layer of your own known; any module with `in_features`, `out_features` and a forward.

    Args:
        matches: is a module such a layer? Its forward must compute x·Wᵀ + `module.bias` (an attribute that may be None).
        rows: (module, a slice or an index tensor) -> those rows of W, (K, I), in any floating dtype; without it they are read
            off the forward, which is slow for large layers on a CPU.
        exact_forward: False where the forward rounds the activations too; found out on one tile if it is not said.
        name: under which the storage is listed; one of the same name is replaced.

    Raises:
        UserError: something that cannot be called.
    """
    for what, value in (("matches", matches), ("rows", rows)):
        if not callable(value) and not (what == "rows" and value is None):
            raise UserError(f"{what} is {value!r}; doratune.bases.register needs a function of a module")
    REGISTERED[name] = Storage(name, matches, rows, exact_forward)


def storage_named(name: str) -> Storage:
    if name in REGISTERED:
        return REGISTERED[name]
    if name == PACKED.name:
        return PACKED
    raise UserError(f"the storage {name!r} is not registered here; call doratune.bases.register before loading this model")


def storage_of(module: nn.Module) -> Storage | None:
    """The registered storage of this module, or None."""
    return next((s for s in (*REGISTERED.values(), PACKED) if _linear_like(module) and s.matches(module)), None)


def _linear_like(module: nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)


def _is_packed(module: nn.Module) -> bool:
    """GPTQ's and AWQ's layers, by what they all have."""
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("qweight", "qzeros", "scales"))


PACKED = Storage("GPTQ or AWQ", _is_packed)


class OpaqueBase(QuantizedBase):
    """A module of which only the forward is known, and perhaps how rows are dequantized."""

    rank = 0

    def __init__(self, kind, storage: Storage):
        super().__init__(kind)
        self.storage, self.name, self.exact_forward = storage, storage.name, storage.exact_forward
        self.by_gradient = True
        self.names: tuple[str, ...] | None = None  # of the tensors that hold W: known before an adapter adds its own

    @classmethod
    def of(cls, kind, module: nn.Module) -> OpaqueBase | None:
        storage = storage_of(module) if kind.may_be_quantized else None
        return None if storage is None else cls(kind, storage)

    @classmethod
    def makes_linear(cls, module: nn.Module) -> bool:
        return storage_of(module) is not None

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """What holds W: the module's parameters and buffers, without its bias."""
        found = {**module._parameters, **module._buffers}
        names = found if self.names is None else self.names
        return {name: found[name] for name in names if name != "bias" and found.get(name) is not None}

    def dtype(self, module: nn.Module) -> torch.dtype:
        """What the layer says it computes in, else that of its first floating-point tensor (its scales)."""
        said = getattr(module, "compute_dtype", None)
        if isinstance(said, torch.dtype):
            return said
        bias = getattr(module, "bias", None)
        tensors = [*self.tensors(module).values(), *([bias] if isinstance(bias, Tensor) else [])]
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    def device(self, module: nn.Module) -> torch.device:
        return next((t.device for t in self.tensors(module).values()), torch.device("cpu"))

    def held(self, module: nn.Module) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in self.tensors(module).values())

    def forward_rows(self, module: nn.Module, rows_KI: Tensor) -> Tensor:
        """The layer's own forward; its bias is 0 meanwhile."""
        forward, bias = getattr(type(module), "plain_class", type(module)).forward, getattr(module, "bias", None)
        if not isinstance(bias, Tensor):
            return forward(module, rows_KI.to(self.dtype(module)))
        zero = torch.zeros_like(bias, requires_grad=False)
        module.bias = nn.Parameter(zero, requires_grad=False) if isinstance(bias, nn.Parameter) else zero
        try:
            return forward(module, rows_KI.to(self.dtype(module)))
        finally:
            module.bias = bias

    def tile_rows(self, module: nn.Module) -> int:
        return max(1, TILE_NUMBERS // max(1, *self.shape(module)))

    def rows(self, module: nn.Module, which: Tensor | slice) -> Tensor:
        if self.storage.rows is not None:
            return self.storage.rows(module, which)
        index = torch.arange(self.shape(module)[0], device=self.device(module))[which]
        ones = torch.zeros(len(index), self.shape(module)[0], device=index.device, dtype=self.dtype(module))
        rows = self._vjp(module, ones.scatter_(1, index[:, None], 1.0))
        return self._by_inputs(module, index) if rows is None else rows

    def backward_rows(self, module: nn.Module, rows_KO: Tensor) -> Tensor:
        if self.storage.rows is None and (rows := self._vjp(module, rows_KO.to(self.dtype(module)))) is not None:
            return rows
        return super().backward_rows(module, rows_KO)

    def _vjp(self, module: nn.Module, rows_KO: Tensor) -> Tensor | None:
        """The layer's input gradient; None: it has none, or one that is not the product's."""
        if not self.by_gradient:
            return None
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(len(rows_KO), self.shape(module)[1], dtype=rows_KO.dtype, device=rows_KO.device, requires_grad=True)
            out = self.forward_rows(module, x)
            return torch.autograd.grad(out, x, rows_KO.to(out.dtype).clone())[0] if out.requires_grad else None

    def _by_inputs(self, module: nn.Module, index: Tensor) -> Tensor:
        columns, step = self.shape(module)[1], self.tile_rows(module)
        W_KI = torch.empty(len(index), columns, dtype=self.dtype(module), device=index.device)
        for start in range(0, columns, step):
            some = torch.arange(start, min(start + step, columns), device=index.device)
            ones = torch.zeros(len(some), columns, dtype=W_KI.dtype, device=index.device).scatter_(1, some[:, None], 1.0)
            W_KI[:, some] = self.forward_rows(module, ones)[:, index].T
        return W_KI

    def trial(self, module: nn.Module) -> str | None:
        """As ever; where the forward's gradient is not that of a product (it rounds), rows are read off one-hot inputs."""
        if self.names is None:
            self.names = tuple(self.tensors(module))
        self.by_gradient, self.exact_forward = True, self.storage.exact_forward
        problem = super().trial(module)
        if self.storage.rows is None and (problem or not self.exact_forward):
            self.by_gradient, self.exact_forward = False, self.storage.exact_forward
            problem = super().trial(module)
        return problem


STORAGES = (OpaqueBase,)
