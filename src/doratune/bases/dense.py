"""Dense base: W is a plain floating-point tensor, seen as (O, I) through the layer kind's view of it.

Cost: products are one GEMM on R rows; tiles are copies of at most `TILE_NUMBERS` numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import TILE_NUMBERS, Base, accumulation_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class DenseBase(Base):
    """`kind` says which parameter holds W and how it is seen as (O, I): a view, so that writing goes through."""

    name = "dense"
    rank = 100
    writable = True

    @staticmethod
    def matches(kind, module: nn.Module) -> bool:
        weight = getattr(module, kind.weight_name, None)
        plain = isinstance(weight, nn.Parameter) and (type(weight.data) is Tensor or hasattr(weight, "device_mesh"))  # or a share
        return plain and weight.dtype in DTYPES

    def weight(self, module: nn.Module) -> Tensor:
        return getattr(module, self.kind.weight_name)

    def matrix(self, module: nn.Module) -> Tensor:
        """W (O, I), a view."""
        return self.kind.matrix(self.weight(module)).detach()

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return tuple(self.kind.matrix(self.weight(module)).shape)

    def dtype(self, module: nn.Module) -> torch.dtype:
        return self.weight(module).dtype

    def device(self, module: nn.Module) -> torch.device:
        return self.weight(module).device

    def version(self, module: nn.Module) -> tuple:
        weight = self.weight(module)
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype, weight.device

    def held(self, module: nn.Module) -> Tensor:
        return self.weight(module).detach()

    def trained(self, module: nn.Module) -> bool:
        return self.weight(module).requires_grad

    def forward_rows(self, module: nn.Module, rows_KI: Tensor) -> Tensor:
        W_OI = self.matrix(module)
        return (W_OI @ rows_KI.to(W_OI.dtype).T).T if len(rows_KI) < W_OI.shape[0] else rows_KI.to(W_OI.dtype) @ W_OI.T

    def backward_rows(self, module: nn.Module, rows_KO: Tensor) -> Tensor:
        W_OI = self.matrix(module)
        return rows_KO.to(W_OI.dtype) @ W_OI

    def row_tiles(self, module: nn.Module, rows: Tensor | None = None) -> Iterator[tuple[Tensor | slice, Tensor]]:
        weight, (count, columns) = self.weight(module).detach(), self.shape(module)
        dtype, count = accumulation_dtype(weight.dtype), count if rows is None else len(rows)
        step = max(1, TILE_NUMBERS // max(1, columns))
        for start in range(0, count, step):
            which = slice(start, min(start + step, count)) if rows is None else rows[start : start + step]
            yield which, self.kind.rows(weight, which).to(dtype)

    def write_rows(self, module: nn.Module, rows: slice, tile_KI: Tensor) -> None:
        weight = self.weight(module).detach()
        into = self.kind.rows(weight, rows, flatten=False)
        into.copy_(tile_KI.view(into.shape))


STORAGES = (DenseBase,)
