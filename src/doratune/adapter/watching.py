"""When a forward of an attached model begins and ends: hooks that tell its registry. Cost: two calls a forward."""

from __future__ import annotations

from torch import nn

from ..layers.adapted import Adapted
from ..layers.registry import Begin, End, Registry
from ..layers.wrappers import unwrapped


def watch(model: nn.Module, registry: Registry) -> None:
    """Tell the registry when a forward of the model begins and ends, also where only its body is called (`model.model(…)`)."""
    module = model
    while True:
        module = unwrapped(module)
        if type(module).forward is not nn.Module.forward and not isinstance(module, Adapted):
            module.register_forward_pre_hook(Begin(registry), with_kwargs=True)
            module.register_forward_hook(End(registry), always_call=True)
        holding = [child for child in module.children() if any(isinstance(inner, Adapted) for inner in child.modules())]
        if len(holding) != 1:
            return
        module = holding[0]


def unwatch(model: nn.Module) -> None:
    """Undo `watch`: while merged or detached, forwards cost nothing."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Begin | End)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
