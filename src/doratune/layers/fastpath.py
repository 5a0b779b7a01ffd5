"""PyTorch's fast paths of transformer encoders read weights and call no layer: closed while a layer in them is adapted.

    nn.TransformerEncoderLayer   in evaluation takes one fused function, unless a module in it has a forward hook
    nn.TransformerEncoder        turns padded input into nested tensors, which only that function takes, while `use_nested_tensor`
    nn.MultiheadAttention        is adapted itself, with a forward of its own (`attention.py`)

A hook that does nothing closes them and marks what was closed, in copies of the model too. The open path rounds otherwise: an
untrained adapter equals the base bit for bit in the mode where the base calls its layers (training, or gradients).
"""

from __future__ import annotations

from torch import nn

from .adapted import Adapted


def _closed(module: nn.Module, args: tuple) -> None:
    """The hook."""


def close(model: nn.Module) -> None:
    """Make every transformer encoder with an adapted layer call its layers."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) or _marks(module):
            continue
        nested = isinstance(module, nn.TransformerEncoder)
        if not any(isinstance(inner, Adapted) for inner in module.modules()) or (nested and not _nests(module)):
            continue
        module.register_forward_pre_hook(_closed)
        if nested:
            module.use_nested_tensor = False


def reopen(model: nn.Module) -> None:
    """Undo `close`."""
    for module in model.modules():
        for key in _marks(module):
            del module._forward_pre_hooks[key]
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = True


def _marks(module: nn.Module) -> list:
    return [key for key, hook in module._forward_pre_hooks.items() if hook is _closed]


def _nests(module: nn.TransformerEncoder) -> bool:
    return getattr(module, "use_nested_tensor", False)
