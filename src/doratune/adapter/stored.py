"""A quantized layer as it was, kept aside while a dense one stands in its place, and the same objects put back.

What is kept is the layer's class and its attributes: nothing of a storage's inner workings has to be known here, only where its
tensors are. Where they are moved to, the parameters and objects stay the same ones, with their tensors moved inside them.

Cost: no copy on the device; the packed bytes of the layer where they are moved to the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..layers.adapted import become

_CURRENT = ("training", "forward", "_old_forward")
"""Attributes that are taken from the layer as it is when it is put back."""

_HOLDERS = ("_parameters", "_buffers", "_modules")


class Stored:
    """The class and the attributes of a plain layer at one moment."""

    def __init__(self, module: nn.Module):
        self.cls = type(module)
        self.attributes = {key: dict(value) if key in _HOLDERS else value for key, value in vars(module).items()}
        self.dense_dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        return sum({t.data_ptr(): t.nbytes for t in tensors_in(_holding(self.attributes))}.values())

    def to(self, device) -> Stored:
        moved(_holding(self.attributes), torch.device(device), self.attributes)
        return self

    def make_dense(self, module: nn.Module, weight_OI: Tensor) -> None:
        """Make the layer an ordinary nn.Linear with this weight; attributes without tensors stay."""
        bias, self.dense_dtype = getattr(module, "bias", None), weight_OI.dtype
        if bias is not None and (bias.dtype != weight_OI.dtype or not isinstance(bias, nn.Parameter)):
            bias = nn.Parameter(bias.detach().to(weight_OI.dtype), requires_grad=False)
        become(module, nn.Linear)
        for key, value in _holding(vars(module)).items():
            if key not in _HOLDERS and next(tensors_in(value), None) is not None:
                delattr(module, key)
        parameters = {"weight": nn.Parameter(weight_OI, requires_grad=False), "bias": bias}
        vars(module).update(_parameters=parameters, _buffers={}, _modules={})
        module.out_features, module.in_features = weight_OI.shape

    def restore(self, module: nn.Module) -> torch.device:
        """Make the layer what it was, on the device where it is now; its bias follows a change of the dense layer's dtype."""
        now = next(t for t in tensors_in(_holding(vars(module))))
        device, dtype = now.device, now.dtype
        become(module, self.cls)
        current = {key: vars(module)[key] for key in _CURRENT if key in vars(module)}
        self.to(device)
        vars(module).clear()
        vars(module).update(self.attributes | current)
        if self.dense_dtype not in (None, dtype) and isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.data = module.bias.data.to(dtype)
        return device


def _holding(attributes: dict) -> dict:
    """Those attributes that may hold a layer's own tensors."""
    return {key: value for key, value in attributes.items() if key in ("_parameters", "_buffers") or not key.startswith("_")}


def tensors_in(value, seen: set | None = None) -> Iterator[Tensor]:
    """Every plain tensor in a nest of containers and objects; other modules are left alone."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        yield from (t for name in value.__tensor_flatten__()[0] for t in tensors_in(getattr(value, name), seen))
    else:
        if isinstance(value, Tensor):
            yield value
        for inner in _inside(value).values():
            yield from tensors_in(inner, seen)


def moved(value, device: torch.device, into=None, memo: dict | None = None):
    """The same value with its tensors on `device`: containers, objects and parameters stay the same objects."""
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)][0]
    result = value
    if isinstance(value, Tensor) and value.device != device:
        result = _moved_tensor(value, device, memo)
    memo[id(value)] = result, value  # held, so that its id stays its own
    target = result if into is None else into
    for key, inner in _inside(value).items():
        if (new := moved(inner, device, memo=memo)) is not inner:
            _put(target, key, new)
    return result


def _moved_tensor(t: Tensor, device: torch.device, memo: dict) -> Tensor:
    if hasattr(t, "__tensor_flatten__"):
        return nn.Parameter(t.detach().to(device), requires_grad=False) if isinstance(t, nn.Parameter) else t.to(device)
    key = t.data_ptr(), t.dtype, t.shape, t.stride()
    data = memo.setdefault(key, (t.data.to(device), t))[0]
    if not isinstance(t, nn.Parameter):
        return data
    t.data = data
    return t


def _inside(value) -> dict:
    """What a container or an object holds, by key."""
    if isinstance(value, dict):
        return value.copy()
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, nn.Module | type) or callable(value) or hasattr(value, "__tensor_flatten__"):
        return {}
    return dict(getattr(value, "__dict__", {}))


def _put(target, key, value) -> None:
    if isinstance(target, dict | list):
        target[key] = value
    elif not isinstance(target, tuple):  # a tuple of tensors is nobody's storage
        setattr(target, key, value)
