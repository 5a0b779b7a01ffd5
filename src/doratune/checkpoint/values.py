"""Are the numbers of an adapter file numbers that an adapter can have? One pass over its tensors.

A, B, m and every other tensor of an adapted layer are floating-point and finite; m = m₀·exp(δ) is positive wherever m₀ is. A whole
module's tensors are of the kind that the model's own are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from ..errors import UserError, listed
from ..layers import kind_of
from ..math import decomposition
from ..support.files import read_tensors
from .tensors import Key, shown

STARTS = "doratune_starts.safetensors"
"""m₀ of relative magnitudes, which decay pulls m to."""

_FLOATS = {
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
}
"""What an adapter's numbers may be stored in: all but float64 widen to fp32 exactly. (8 bits with scales have further tensors.)"""


def problems(tensors: dict[Key, Tensor], whole: dict[str, Tensor]) -> list[str]:
    """What is wrong with the values; whole: the model's own tensors under the keys of modules that are trained whole."""
    wrong = []
    for key, t in tensors.items():
        own = whole.get(key[1]) if not key[0] else None
        if own is not None and (own.is_floating_point() != t.is_floating_point() or own.is_complex() != t.is_complex()):
            wrong.append(f"{shown(key)} is {_dtype(t)}, the model's is {_dtype(own)}")
        elif own is None and t.dtype not in _FLOATS:
            wrong.append(f"{shown(key)} is {_dtype(t)}, expected floating-point numbers")
        elif (own is None or isinstance(own, nn.Parameter)) and not finite(t):
            wrong.append(f"{shown(key)} holds NaN or infinite values")
    return wrong


def finite(t: Tensor) -> bool:
    return not t.is_floating_point() or bool(torch.isfinite(t.float() if t.dtype.itemsize < 2 else t).all())


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def read_starts(folder: Path, layers: dict[str, nn.Module], config: AdapterConfig) -> dict[str, Tensor]:
    """Layer → m₀ as it was saved; empty where magnitudes are not relative or the folder has no file of them.

    Raises:
        UserError: a corrupt file, or one that does not belong to these layers.
    """
    path = folder / STARTS
    if config.magnitude_form != "relative" or not path.is_file():
        return {}
    starts = {key.removesuffix(".magnitude_start"): t for key, t in read_tensors(path).items()}
    wrong = [f"{name} is missing" for name in layers if name not in starts]
    wrong += [f"{name} fits nothing in the model" for name in starts if name not in layers]
    for name, t in starts.items():
        if name in layers and t.shape != (expected := magnitude_shape(layers[name], config)):
            wrong.append(f"{name} has shape {tuple(t.shape)}, the model needs {tuple(expected)}")
        elif t.dtype not in _FLOATS or not finite(t) or bool((t < 0).any()):
            wrong.append(f"{name} holds something else than finite numbers of at least 0")
    if wrong:
        raise UserError(f"{path} does not belong to this adapter: {listed(wrong, 4)}; copy it again, or delete it")
    return starts


def magnitude_shape(layer: nn.Module, config: AdapterConfig) -> torch.Size:
    kind = kind_of(layer)
    *stack, rows, columns = kind.base(layer).shape(layer)
    return torch.Size((*stack, rows if kind.axis(config) == "output" else columns))


def relative_problems(config: AdapterConfig, tensors: dict[Key, Tensor], layers: dict[str, nn.Module], starts) -> list[str]:
    """Magnitudes that no m₀·exp(δ) is: negative ones, and zeros where the weight has a norm."""
    if config.magnitude_form != "relative":
        return []
    wrong = []
    for name, layer in layers.items():
        m = tensors.get((name, "magnitude"))
        if m is None or not m.is_floating_point() or m.numel() != magnitude_shape(layer, config).numel():
            continue
        m = m.float().flatten()
        zeros = m == 0
        if bool((m < 0).any()) or (bool(zeros.any()) and bool((zeros & (_norms(name, layer, config, starts) > 0)).any())):
            wrong.append(f"{name}.magnitude holds values of 0 or less, which m₀·exp(δ) never is")
    return wrong


def _norms(name: str, layer: nn.Module, config: AdapterConfig, starts: dict[str, Tensor]) -> Tensor:
    """m₀ as a vector: as it was saved, else |W|."""
    kind = kind_of(layer)
    if name in starts or kind.stacked:
        return starts[name].float().flatten() if name in starts else torch.ones(magnitude_shape(layer, config)).flatten()
    base, axis = kind.base(layer), kind.axis(config)
    if base.device(layer).type == "meta":
        return torch.zeros(magnitude_shape(layer, config))  # not known: zeros pass
    length = base.shape(layer)[0 if axis == "output" else 1]
    return decomposition.squared_norms(base.row_tiles(layer), length, axis, torch.float32, base.device(layer)).cpu()
