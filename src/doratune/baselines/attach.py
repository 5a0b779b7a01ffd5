"""Attach a baseline to a model in place, walk over its parameters, and take it off again."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import nn

from ..adapter.attach import BASELINE as RECORD
from ..adapter.attach import RECORD as ADAPTER
from ..bases import accumulation_dtype
from ..errors import UserError, listed
from ..layers import kind_of
from ..layers.adapted import Adapted
from ..layers.layouts import named_layers
from . import bottleneck, prefix
from .config import BaselineConfig
from .layer import BaselineLayer, own_parameters, put_on, take_off

_METHODS = {
    "series": (bottleneck, bottleneck.Bottleneck),
    "parallel": (bottleneck, bottleneck.Bottleneck),
    "prefix": (prefix, prefix.Prefixed),
}


@dataclass
class BaselineRecord:
    """What `attach` did to a model, kept on the model as a plain attribute so that copies of the model carry it."""

    config: BaselineConfig
    requires_grad: dict[str, bool]
    attention: list[str] | None = None


def attach(model: nn.Module, config: BaselineConfig, *, trainable: bool = True) -> nn.Module:
    """Add a baseline to a model in place and return it; everything else is frozen.

    Raises:
        UserError: something is attached already, or the configuration does not fit; the model is then unchanged.
    """
    refuse_attached(model)
    return attach_shapes(model, config, shapes(model, config), trainable)


def attach_shapes(model: nn.Module, config: BaselineConfig, module_shapes: dict, trainable: bool) -> nn.Module:
    """`attach` for shapes that are known already."""
    devices = {name: _place(model.get_submodule(name)) for name in module_shapes}
    if empty := [name for name, (device, _) in devices.items() if device.type == "meta"]:
        raise UserError(f"{listed(empty, 3)}: on the meta device; load the model's weights before attaching")
    record = BaselineRecord(config, {name: p.requires_grad for name, p in model.named_parameters()})
    functions, mixin = _METHODS[config.method]
    values = {}
    for name, wanted in module_shapes.items():
        generator = torch.Generator().manual_seed((config.seed << 32) + zlib.crc32(name.encode()))
        device, dtype = devices[name]
        values[name] = {key: functions.start(shape, key, generator).to(device, dtype) for key, shape in wanted.items()}
    for p in model.parameters():
        p.requires_grad_(False)
    for name, own in values.items():
        put_on(model.get_submodule(name), mixin, config, own, trainable)
    if config.method == "prefix":
        record.attention = prefix.switch(model)
    setattr(model, RECORD, record)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Back to the untouched base model, in place: same modules, same tensors, same `requires_grad`.

    Raises:
        UserError: nothing is attached.
    """
    record = record_of(model)
    for module in list(model.modules()):
        if isinstance(module, BaselineLayer):
            take_off(module)
    if record.attention is not None:
        prefix.switch_back(model, record.attention)
    for name, p in model.named_parameters():
        p.requires_grad_(record.requires_grad.get(name, p.requires_grad))
    delattr(model, RECORD)
    return model


def attached(model: nn.Module) -> BaselineConfig | None:
    """The configuration of the baseline that is attached, or None."""
    record = vars(model).get(RECORD)
    return None if record is None else record.config


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that the baseline added, by its name in the model.

    Raises:
        UserError: nothing is attached.
    """
    record_of(model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaselineLayer)]
    return {f"{name}.{key}": p for name, module in layers for key, p in own_parameters(module).items()}


def count(model: nn.Module, config: BaselineConfig) -> tuple[int, int]:
    """(trainable numbers, the model's own numbers) that a configuration would give; the model may be on the meta device.

    The paper's parameter shares are trainable / (trainable + own).

    Raises:
        UserError: something is attached already, or the configuration does not fit.
    """
    refuse_attached(model)
    sizes = [torch.Size(shape).numel() for wanted in shapes(model, config).values() for shape in wanted.values()]
    return sum(sizes), sum(p.numel() for p in model.parameters())


def shapes(model: nn.Module, config: BaselineConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module → parameter → shape that a configuration gives; the model is as before."""
    _refuse_quantized(model)
    return _METHODS[config.method][0].shapes(model, config)


def record_of(model: nn.Module) -> BaselineRecord:
    record = getattr(model, "__dict__", {}).get(RECORD)
    if record is None:
        raise UserError(f"no baseline is attached to this {type(model).__name__}; call doratune.baselines.attach first")
    return record


def refuse_attached(model: nn.Module) -> None:
    """One adapter or baseline at a time."""
    for name, module in model.named_modules():
        where = name or f"this {type(model).__name__}"
        if isinstance(module, Adapted) or vars(module).get(ADAPTER) is not None:
            raise UserError(f"{where} has a doratune adapter already; call doratune.detach(model) before attaching a baseline")
        if isinstance(module, BaselineLayer) or vars(module).get(RECORD) is not None:
            raise UserError(f"{where} has a baseline already; call doratune.baselines.detach(model) before attaching another")


def _refuse_quantized(model: nn.Module) -> None:
    """Storages whose kernels drop the gradient (bitsandbytes' 4 bit on CPU once it was evaluated) would stop what trains below them
    without a word; adapters have their own gradient there, baselines do not."""
    for name, module in named_layers(model):
        kind = kind_of(module)
        base = kind.base(module) if kind is not None and kind.linear else None
        if base is not None and not base.writable:
            raise UserError(f"{name} is quantized ({base.name}); baselines need an unquantized model: load it with quantize none")


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where new parameters of a module go, and in which dtype."""
    first = next(module.parameters())
    return first.device, accumulation_dtype(first.dtype)
