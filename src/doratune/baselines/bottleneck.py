"""Series and parallel adapters: a bottleneck down (N, ·), up (O, N) without biases around a linear layer.

    series      y + s·up(act(down(y)))
    parallel    y + s·up(act(down(x)))

up starts at 0, so the model starts exactly as the base; down starts as a linear layer does. That is LLM-Adapters'
`init_weights="mam_adapter"`; its default draws both from N(0, 0.02²) and does not start at the base.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter.targets import select
from ..config import AdapterConfig
from ..errors import UserError, listed
from ..layers import kind_of
from ..layers.layouts import layer_at
from ..math.autograd import no_autocast
from .config import BaselineConfig
from .layer import SETTINGS, BaselineLayer

_FUNCTIONS = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Bottleneck(BaselineLayer):
    """The layer's own forward, and the bottleneck on its output (series) or its input (parallel)."""

    names = ("adapter_down", "adapter_up")

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        config = getattr(self, SETTINGS)
        source = out if config.method == "series" else next(iter((*args, *kwargs.values())))
        with no_autocast(out.device):  # the output's dtype rules, which autocast has chosen already
            return out + self.correction(source.to(out.dtype), config)

    def correction(self, source: Tensor, config: BaselineConfig) -> Tensor:
        """s·up(act(down(source))), in the dtype of source."""
        inner = _FUNCTIONS[config.activation](F.linear(source, self.adapter_down.to(source.dtype)))
        correction = F.linear(inner, self.adapter_up.to(source.dtype))
        return correction if config.scaling == 1 else config.scaling * correction


def shapes(model: nn.Module, config: BaselineConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module → parameter → shape, for every target.

    Raises:
        UserError: a pattern that selects nothing, or a module that is no linear layer.
    """
    names = select(model, AdapterConfig(method="lora", rank=1, targets=config.targets)).ranks
    modules = {name: layer_at(model, name) for name in names}
    if other := [f"{name} ({kind_of(m).name})" for name, m in modules.items() if not kind_of(m).linear]:
        raise UserError(f"targets: {listed(other, 3)}: a {config.method} adapter goes on linear layers; leave the others out")
    shapes = {}
    for name, module in modules.items():
        rows, columns = kind_of(module).base(module).shape(module)
        shapes[name] = {
            "adapter_down": (config.size, rows if config.method == "series" else columns),
            "adapter_up": (rows, config.size),
        }
    return shapes


def start(shape: tuple[int, ...], name: str, generator: torch.Generator) -> Tensor:
    """First values, fp32 on the CPU."""
    if name == "adapter_up":
        return torch.zeros(shape)
    return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])
