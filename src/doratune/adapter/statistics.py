"""Running statistics of normalization layers: a frozen base keeps its own while an adapter is trained over it.

In training mode BatchNorm normalizes by the batch and moves its running mean and variance. Those are buffers of the base, in no
adapter's file: what was trained and what is loaded again would differ, and one image's output would depend on its batch. A layer in
evaluation mode uses the pretrained statistics and moves none; its weight and bias are trained or not as before. Cost: one walk over
the modules a call.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..layers.wrappers import named_modules


def moving_statistics(model: nn.Module) -> list[str]:
    """Names of the layers that would move their statistics in training mode."""
    return [name for name, module in named_modules(model) if _moves(module)]


def hold_statistics(model: nn.Module) -> None:
    """Put those layers into evaluation mode, until somebody calls `train()` on the model again."""
    for module in model.modules():
        if module.training and _moves(module):
            module.training = False


def _moves(module: nn.Module) -> bool:
    """Has it running statistics, of whatever class?"""
    return isinstance(getattr(module, "running_mean", None), Tensor)
