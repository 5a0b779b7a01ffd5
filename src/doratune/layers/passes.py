"""Which implementation computes the passes over an output and the direct norm: PyTorch, or Triton on CUDA.

`select()` gives (implementation, reason). An explicit request (`use`, or DORATUNE_KERNELS=torch|triton) that cannot be met
raises; where `auto` has to do without Triton on a CUDA device, that is said once. In `auto`, each shape is timed once in both
and the faster one kept (`math/kernels/fastest.py`), so Triton is never the slower choice. Chosen when factors are prepared.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, listed, near_misses
from ..math import dora
from ..math.dora import Factors

IMPLEMENTATIONS = ("auto", "torch", "triton")
LOW_AND_SINGLE = (torch.bfloat16, torch.float16, torch.float32)

_requested: str | None = None
_said: set[str] = set()
"""What this process asked for and what was said to it: a machine's kernels, not a model's."""


class Choice(NamedTuple):
    implementation: str
    reason: str


def use(name: str) -> None:
    """Ask for an implementation: auto, torch or triton.

    Raises:
        UserError: an unknown name, or one that no device of this machine can run.
    """
    global _requested
    if name not in IMPLEMENTATIONS:
        raise UserError(f"kernel is {name!r}; expected {listed(IMPLEMENTATIONS)}{near_misses(name, IMPLEMENTATIONS)}")
    if name == "triton" and (problem := _no_triton(torch.device("cuda"))):
        raise UserError(f"kernel 'triton' cannot run here: {problem}; use 'auto' or 'torch'")
    _requested = name


def requested() -> str:
    """What was asked for: by `use`, else by DORATUNE_KERNELS, else auto."""
    if _requested is None:
        use(os.environ.get("DORATUNE_KERNELS", "auto"))
    return _requested


def select(device: torch.device, dtype: torch.dtype) -> Choice:
    """The implementation for tensors of this device and dtype, and why.

    Raises:
        UserError: triton was asked for and cannot run on them.
    """
    name = requested()
    if name == "torch":
        return Choice("torch", "asked for")
    problem = _no_triton(device) or _no_dtype(dtype)
    if name == "triton":
        if problem:
            raise UserError(f"kernel 'triton' cannot run on {device.type} in {str(dtype)[6:]}: {problem}; use 'auto' or 'torch'")
        return Choice("triton", "asked for")
    if problem:
        if device.type == "cuda":
            _say_once(f"doratune uses PyTorch's own kernels: {problem}")
        return Choice("torch", problem)
    return Choice("triton", "a CUDA device, with Triton")


def _no_triton(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or not torch.cuda.is_available():
        return "Triton needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"its kernels need compute capability 8.0, the device has {major}.{minor}"


def _no_dtype(dtype: torch.dtype) -> str | None:
    if dtype not in LOW_AND_SINGLE:
        return f"no Triton kernel for {dtype}"
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter computes bf16 products wrongly"
    return None


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        warnings.warn(line, RuntimeWarning, stacklevel=3)


def kernels_for(device: torch.device, dtype: torch.dtype) -> Fused | Fastest | None:
    """What `Factors.passes` is: the kernels for an output of this device and dtype; None: PyTorch's, in `math/dora.py`."""
    if device.type == "cpu" and requested() != "triton":
        return None
    if select(device, dtype).implementation == "torch":
        return None
    return Fused() if requested() == "triton" else Fastest()


class Fused:
    """Triton's kernels."""

    def compose(self, out_TO: Tensor, g_O: Tensor, shift_O: Tensor | None, z_TR: Tensor | None, B_OR: Tensor | None) -> Tensor:
        """y = g ⊙ out + shift + z·Bᵀ."""
        from ..math.kernels import triton_kernels

        return triton_kernels.compose(out_TO, g_O, shift_O, z_TR, B_OR)

    def compose_backward(self, dY_TO: Tensor, kept_TO: Tensor, g_O: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
        """(g ⊙ dY, Σ_T dY ⊙ (kept − bias))."""
        from ..math.kernels import triton_kernels

        return triton_kernels.compose_backward(dY_TO, kept_TO, g_O, bias_O)


class Plain:
    """The same in PyTorch."""

    def compose(self, out_TO, g_O, shift_O, z_TR, B_OR) -> Tensor:
        y_TO = dora.scale(Factors.of(g=g_O, shift=shift_O, wide=g_O.dtype), out_TO)
        return y_TO if z_TR is None else y_TO.addmm_(z_TR, B_OR.T)

    def compose_backward(self, dY_TO, kept_TO, g_O, bias_O) -> tuple[Tensor, Tensor]:
        return dora.scale_backward(Factors.of(g=g_O, bias=bias_O, wide=g_O.dtype), dY_TO, kept_TO)


class Fastest:
    """Whichever of both is faster for a shape."""

    def compose(self, out_TO, g_O, shift_O, z_TR, B_OR) -> Tensor:
        rank = 0 if z_TR is None else z_TR.shape[1]
        return self._faster("compose", (*out_TO.shape, rank), out_TO, (out_TO, g_O, shift_O, z_TR, B_OR))

    def compose_backward(self, dY_TO, kept_TO, g_O, bias_O) -> tuple[Tensor, Tensor]:
        return self._faster("compose_backward", tuple(dY_TO.shape), dY_TO, (dY_TO, kept_TO, g_O, bias_O))

    def _faster(self, operation: str, shape: tuple, tensor: Tensor, arguments: tuple):
        from ..math.kernels import fastest

        candidates = getattr(Fused(), operation), getattr(Plain(), operation)
        return fastest.call(operation, shape, tensor, candidates, arguments)


def direct_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, s: float, factored: Callable[[], Tensor]) -> Tensor:
    """n = |W + s·B·A| per row (O,) in fp32, in one pass over W where Triton runs; else `factored()`, which gives the same."""
    if select(W_OI.device, W_OI.dtype).implementation == "torch":
        return factored()
    from ..math.kernels import fastest, triton_kernels

    def fused() -> Tensor:
        return triton_kernels.direct_norm(W_OI, A_RI, B_OR, s)

    if requested() == "triton":
        return fused()
    return fastest.call("direct_norm", (*W_OI.shape, len(A_RI)), W_OI, (fused, factored))
