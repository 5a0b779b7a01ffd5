"""What every quantized storage shares: products from row tiles, and a trial of its forward on one tile.

    rows · W = Σ rows[:, tile]·W[tile]          in fp32 (fp64), tile by tile: no dense copy of W is ever alive

Some forwards round the activations too (8 bit), and some kernels have no gradient: the output then does not depend on x as
far as autograd knows, and everything in front of the layer would silently not learn. Both are found out on one tile at attach:
U comes from row tiles where the forward is inexact, and x's gradient from row tiles where the layer has none.

Cost: the trial is one forward of 4 rows and one tile; a product from tiles dequantizes W once.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import TILE_NUMBERS, Base, accumulation_dtype, identity

INEXACT = 1e-2
"""Relative error of the forward against the row tiles from which on it is not used for U."""

WRONG = 0.3
"""From this relative error on it is no rounding: a kernel or a function for rows that does something else."""

_TRIAL_ROWS = 4


class QuantizedBase(Base):
    """A storage says how rows of W are dequantized (`rows`) and how its layer multiplies (`forward_rows`)."""

    name = "quantized"

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.out_features, module.in_features

    def device(self, module: nn.Module) -> torch.device:
        return self.held(module)[0].device

    def version(self, module: nn.Module) -> tuple:
        return identity(self.held(module))

    @abstractmethod
    def held(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The tensors that hold W."""
        raise NotImplementedError

    @abstractmethod
    def rows(self, module: nn.Module, which: Tensor | slice) -> Tensor:
        """Those rows of W (K, I), in any floating dtype."""
        raise NotImplementedError

    def tile_rows(self, module: nn.Module) -> int:
        """How many rows of W one tile holds."""
        return max(1, TILE_NUMBERS // max(1, self.shape(module)[1]))

    def row_tiles(self, module: nn.Module, rows: Tensor | None = None) -> Iterator[tuple[Tensor | slice, Tensor]]:
        count = self.shape(module)[0] if rows is None else len(rows)
        dtype, step = accumulation_dtype(self.dtype(module)), self.tile_rows(module)
        for start in range(0, count, step):
            which = slice(start, min(start + step, count)) if rows is None else rows[start : start + step]
            yield which, self.rows(module, which).to(dtype)

    def backward_rows(self, module: nn.Module, rows_KO: Tensor) -> Tensor:
        """rows · W (K, I) in fp32 (fp64): the layer's own gradient would dequantize all of W."""
        total = None
        for which, tile in self.row_tiles(module):
            part = rows_KO[:, which].to(tile.dtype)
            total = part @ tile if total is None else total.addmm_(part, tile)
        return rows_KO.new_zeros(len(rows_KO), self.shape(module)[1]) if total is None else total

    def ready(self, module: nn.Module) -> str | None:
        """Why there is no quantized weight to adapt yet, or None."""
        return None

    def trial(self, module: nn.Module) -> str | None:
        """Run the layer once on one tile: None, with `exact_forward` and `has_gradient` found out, or why it does not run."""
        if problem := self.ready(module):
            return problem
        columns, device, dtype = self.shape(module)[1], self.device(module), self.dtype(module)
        if device.type == "meta" or 0 in self.shape(module):
            return None
        x = torch.linspace(0, 50, _TRIAL_ROWS * columns, device=device).sin_().view(_TRIAL_ROWS, -1).to(dtype)
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                out = self.forward_rows(module, x.requires_grad_())
                which, tile = next(self.row_tiles(module))
        except Exception as error:  # whatever a kernel raises where it does not run
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:100]
            return f"its forward fails on {device.type} ({type(error).__name__}: {reason})"
        with torch.no_grad():
            x_wide, part = x.to(tile.dtype), out[:, which].to(tile.dtype)
            error = _error(part, x_wide @ tile.T)
            if not error <= WRONG:
                return f"its forward and its dequantized rows differ by {100 * error:.0f} %; one of them is wrong"
            self.exact_forward = self.exact_forward and error <= INEXACT
            self.has_gradient = _gradient_is(x, out, which, part, part @ tile)
        return None


def _error(got: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm; 0 where both are 0."""
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def _gradient_is(x: Tensor, out: Tensor, which: slice, dY: Tensor, expected: Tensor) -> bool:
    """Does the output gradient dY of rows `which` of W give this input gradient?"""
    if not out.requires_grad:
        return False
    full = torch.zeros_like(out)
    full[:, which] = dY.to(out.dtype)
    try:
        with warnings.catch_warnings():  # of PyTorch's stand-in for a kernel without a gradient
            warnings.simplefilter("ignore")
            got = torch.autograd.grad(out, x, full, allow_unused=True)[0]
    except Exception:  # of a kernel whose backward is not there
        return False
    return got is not None and _error(got.to(expected.dtype), expected) <= WRONG
