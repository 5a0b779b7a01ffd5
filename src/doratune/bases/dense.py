"""Dense base: W is a plain floating-point tensor, seen as (O, I) through the layer kind's view of it.

Cost: products are one GEMM on R rows; tiles are copies of at most `TILE_NUMBERS` numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from . import TILE_NUMBERS, accumulation_dtype


class DenseBase:
    """`matrix(module)` is the layer kind's (O, I) view of its weight; a view, so that writing goes through."""

    exact_forward = True

    def __init__(self, matrix: Callable[[nn.Module], Tensor]):
        self.matrix = matrix

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return tuple(self.matrix(module).shape)

    def dtype(self, module: nn.Module) -> torch.dtype:
        return module.weight.dtype

    def device(self, module: nn.Module) -> torch.device:
        return module.weight.device

    def version(self, module: nn.Module) -> tuple:
        weight = module.weight
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype, weight.device

    def forward_rows(self, module: nn.Module, rows_KI: Tensor) -> Tensor:
        W_OI = self.matrix(module).detach()
        return (W_OI @ rows_KI.to(W_OI.dtype).T).T if len(rows_KI) < W_OI.shape[0] else rows_KI.to(W_OI.dtype) @ W_OI.T

    def backward_rows(self, module: nn.Module, rows_KO: Tensor) -> Tensor:
        W_OI = self.matrix(module).detach()
        return rows_KO.to(W_OI.dtype) @ W_OI

    def row_tiles(self, module: nn.Module, rows: Tensor | None = None) -> Iterator[tuple[Tensor | slice, Tensor]]:
        W_OI = self.matrix(module).detach()
        dtype = accumulation_dtype(W_OI.dtype)
        step = max(1, TILE_NUMBERS // max(1, W_OI.shape[1]))
        count = W_OI.shape[0] if rows is None else len(rows)
        for start in range(0, count, step):
            which = slice(start, min(start + step, count)) if rows is None else rows[start : start + step]
            yield which, W_OI[which].to(dtype)

    def write_rows(self, module: nn.Module, rows: slice, tile_KI: Tensor) -> None:
        self.matrix(module).detach()[rows] = tile_KI.to(module.weight.dtype)
