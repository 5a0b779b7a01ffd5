"""Hooks that tell a registry when a forward of a model begins and ends, also where only its body is called (`model.model(…)`).

Where a model has one child that holds all adapted layers, that child has the hooks too, and so on downwards. Cost: two calls of
Python a forward and module of that chain.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..math.compiled import NO_ONNX
from .registry import LIGHT_TOKENS, Registry
from .wrappers import unwrapped


class Begin:
    """The hook at the beginning of a model's forward."""

    def __init__(self, registry: Registry):
        self.registry = registry

    def __call__(self, module, args, kwargs) -> None:
        if not torch.compiler.is_compiling():
            if torch.onnx.is_in_onnx_export() and any(weight.magnitude for weight in self.registry.weights()):
                raise UserError(NO_ONNX)
            self.registry.enter(not torch.is_grad_enabled() and few_tokens((*args, *kwargs.values())), module)


class End(Begin):
    """The hook at its end."""

    def __call__(self, *_) -> None:
        if not torch.compiler.is_compiling():
            self.registry.leave()


def few_tokens(inputs: tuple) -> bool:
    """Are there fewer than 64 tokens in some input of a model? Of floating point, the last dimension has features."""
    tensors = [t for t in inputs if isinstance(t, Tensor) and not t.is_nested]
    sizes = [t.numel() // max(1, t.shape[-1]) if t.is_floating_point() and t.dim() > 1 else t.numel() for t in tensors]
    return bool(sizes) and min(sizes) < LIGHT_TOKENS


def put_hooks(model: nn.Module, registry: Registry, adapted: Callable[[nn.Module], bool], begin: type[Begin] = Begin) -> None:
    """Hooks on the model and downwards; adapted: is this one of the layers?"""
    module = model
    while True:
        module = unwrapped(module)
        if type(module).forward is not nn.Module.forward and not adapted(module):
            module.register_forward_pre_hook(begin(registry), with_kwargs=True)
            module.register_forward_hook(End(registry), always_call=True)
        holding = [child for child in module.children() if any(adapted(inner) for inner in child.modules())]
        if len(holding) != 1:
            return
        module = holding[0]


def take_hooks(model: nn.Module) -> None:
    """Undo `put_hooks`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Begin | End)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
