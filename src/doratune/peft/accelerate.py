"""`accelerate` and `restore`: the DoRA layers of a PEFT model get a forward with this package's maths, in place, and give it back.

Of a PeftModel, of a model with PEFT inside (transformers' `add_adapter`, diffusers' `load_lora_weights`), or of a part of one.
Layers that are added later join when the model's next forward begins. Cost: quantized layers are tried once, on one tile of rows;
every weight's row norms at its first call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..adapter.kernels import writing_kernels
from ..errors import UserError, listed
from ..layers import kind_of
from ..layers.adapted import become
from ..layers.watch import Begin, put_hooks, take_hooks
from ..layers.wrappers import named_modules, unwrapped
from . import sources
from .layer import Accelerated, LayerWeights, accelerated_class
from .weight import PeftRegistry

NO_ONNX = "ONNX has no operator for an accelerated layer; call doratune.peft.restore(model), or merge, and export that"


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did: names of the layers that have our forward, and of those left to PEFT, with the reason."""

    layers: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        line = f"{len(self.layers)} DoRA layers of PEFT accelerated"
        if not self.left:
            return line
        return f"{line}, {len(self.left)} left to PEFT: {listed([f'{name} ({why})' for name, why in self.left.items()], 3)}"


def accelerate(model: nn.Module) -> Acceleration:
    """Give the DoRA layers of a PEFT model this package's maths, in place; parameters, files and results stay PEFT's.

    Adapters and layers that come later (`add_adapter`, `load_adapter`) are taken in by themselves. Called again, it looks again.

    Returns:
        Which layers, and which were left as they are and why.

    Raises:
        UserError: no DoRA layer of PEFT in the model, or none that can be accelerated; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"expected a model with a DoRA adapter of PEFT, got {type(model).__name__}")
    plain = unwrapped(model)
    registry = _registry_of(plain)
    report, joining = _look(plain)
    if not report.layers:
        raise UserError(_nothing(plain, report.left))
    if registry is None:
        registry = PeftRegistry()
        registry.overwritten = bool(writing_kernels(plain))
    _take_in(joining, registry)
    if not any(isinstance(hook, BeginPeft) for hook in plain._forward_pre_hooks.values()):
        take_hooks(plain)
        put_hooks(plain, registry, sources.is_lora, BeginPeft)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place: PEFT's own classes and forwards, with the parameters as they are now. Returns the model.

    Raises:
        UserError: nothing in it is accelerated.
    """
    layers = [module for module in model.modules() if isinstance(module, Accelerated)] if isinstance(model, nn.Module) else []
    if not layers:
        what = type(model).__name__
        raise UserError(f"no layer of this {what} is accelerated; pass the model that was given to doratune.peft.accelerate")
    for module in layers:
        module.layer_weights.base.release(module.base_layer)
        module.layer_weights.registry.modules.discard(module)
        del module.layer_weights
        become(module, type(module).plain_class)
    take_hooks(model)
    return model


def _look(model: nn.Module) -> tuple[Acceleration, list[nn.Module]]:
    """(what is or can be accelerated, the layers among them that are not yet)."""
    layers, left, joining = [], {}, []
    for name, module in named_modules(model):
        if isinstance(module, Accelerated):
            layers.append(name)
        elif sources.is_lora(module) and sources.dora_adapters(module):
            if problem := sources.refusal(module):
                left[name] = problem
            else:
                layers.append(name)
                joining.append(module)
    return Acceleration(tuple(layers), left), joining


def _take_in(modules: list[nn.Module], registry: PeftRegistry) -> None:
    for module in modules:
        base = kind_of(module.base_layer).base(module.base_layer)
        base.trial(module.base_layer)
        base.adopt(module.base_layer)
        module.layer_weights = LayerWeights(registry, base)
        become(module, accelerated_class(type(module)))
        module.layer_weights.renew(module)


def _registry_of(model: nn.Module) -> PeftRegistry | None:
    return next((module.layer_weights.registry for module in model.modules() if isinstance(module, Accelerated)), None)


def _nothing(model: nn.Module, left: dict[str, str]) -> str:
    """Why there is nothing to accelerate."""
    what = type(model).__name__
    if left:
        return f"no DoRA layer of this {what} can be accelerated: {listed([f'{n} ({why})' for n, why in left.items()], 3)}"
    methods = sorted({type(module).__name__ for module in model.modules() if sources.is_adapted(module)})
    if methods:
        return f"the adapters of PEFT in this {what} are no DoRA ({listed(methods)}); make them with LoraConfig(use_dora=True)"
    return f"this {what} has no adapter of PEFT; pass what peft.get_peft_model or add_adapter gave, made with use_dora=True"


class BeginPeft(Begin):
    """The hook at the beginning of a model's forward: takes in layers that were added, and takes itself off where all are gone."""

    def __init__(self, registry: PeftRegistry):
        super().__init__(registry)
        self.known: list = []  # the configurations of the adapters that the model had

    def __call__(self, module, args, kwargs) -> None:
        if torch.compiler.is_compiling():
            return
        registry = self.registry
        if torch.onnx.is_in_onnx_export():
            raise UserError(NO_ONNX)
        if not registry.here.depth:
            self._follow(module)
        if registry.looked_at() != registry.size:
            registry.forget()
        if not registry.modules and not registry.here.depth:
            take_hooks(module)
            return
        super().__call__(module, args, kwargs)

    def _follow(self, module: nn.Module) -> None:
        """Take in layers that came with another adapter."""
        configurations = list((getattr(module, "peft_config", None) or {}).values())
        if len(configurations) == len(self.known) and all(a is b for a, b in zip(configurations, self.known)):
            return
        self.known = configurations
        _take_in(_look(unwrapped(module))[1], self.registry)
