"""Adapters of other packages in a model, which would be adapted or merged as if they were the model's own: found, and refused.

    PEFT        BaseTunerLayer, or what looks like one (a `base_layer` and containers beside it); modules_to_save; prompt encoders;
                modules of its own with parameters
    adapters    modules with a container of `loras` or `prefix_tunings`

Asked before anything is touched, by attaching, saving, merging and taking off. Cost: one walk over the modules.
"""

from __future__ import annotations

import sys

from torch import nn

from ..errors import UserError, listed
from ..layers.wrappers import named_modules


def foreign(model: nn.Module) -> dict[str, str]:
    """Module → what it is, for every module that another package put an adapter on."""
    return {name: type(module).__name__ for name, module in named_modules(model) if _is_foreign(module)}


def _is_foreign(module: nn.Module) -> bool:
    layers = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if layers is not None and isinstance(module, layers):
        return True
    held = module._modules
    containers = [child for child in held.values() if isinstance(child, nn.ModuleDict | nn.ParameterDict)]
    if isinstance(held.get("base_layer"), nn.Module) and containers:
        return True
    if isinstance(held.get("original_module"), nn.Module) and isinstance(held.get("modules_to_save"), nn.ModuleDict):
        return True
    if _of_peft(module) and module._parameters:
        return True
    if "prompt_encoder" in held and hasattr(module, "peft_config"):
        return True
    return any(isinstance(held.get(name), nn.ModuleDict) and len(held[name]) for name in ("loras", "prefix_tunings"))


def _of_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def take_from_between(model: nn.Module) -> None:
    """Give modules that PEFT stands in front of (`child.model`) their place in the model again."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            while child is not None and _of_peft(child) and isinstance(inner := child._modules.get("model"), nn.Module):
                child = module._modules[key] = inner


def refuse_foreign(model: nn.Module, before: str) -> None:
    """Raise where the model has another package's adapter; before: what was asked for.

    Raises:
        UserError: the modules, and what takes such adapters off.
    """
    if not (found := foreign(model)):
        return
    shown = listed([f"{name} ({kind})" if name else kind for name, kind in found.items()], 3)
    calls = "merge_and_unload() or unload() of its PeftModel"
    if any(hasattr(module, "unload_lora") for module in model.modules()):  # diffusers
        calls = "unload_lora_weights() of its pipeline"
    elif any("prompt_encoder" in module._modules for module in model.modules()):
        calls = "get_base_model() of its PeftModel"
    raise UserError(f"this model holds another package's adapter: {shown}; call {calls} and use what that gives before {before}")
