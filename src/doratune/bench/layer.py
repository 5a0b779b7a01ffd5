"""One square linear layer, trained: forward, backward to x, AdamW; every arm on the same x (T, I) and dY (T, O).

The optimizer's step is part of it, since it is what makes a cached norm stale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..support.models import torch_dtype
from ..support.progress import Progress, silent
from .arms import build, make_optimizer, trainable
from .clock import interleave, prepare, summary
from .settings import BenchSettings
from .train_step import RATIOS


class LayerStep:
    """Callable: one training step of a model that is one layer."""

    def __init__(self, model: nn.Module, tokens: int, size: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        x, dY = (torch.randn(tokens, size, generator=generator).to(device, dtype) for _ in range(2))
        self.model, self.x, self.dY = model.train(), x.requires_grad_(), dY
        self.optimizer = make_optimizer(trainable(model))

    def forward(self) -> Tensor:
        return self.model(self.x)

    def __call__(self) -> None:
        self.forward().backward(self.dY)
        self.x.grad = None
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


def one_layer(size: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model of one nn.Linear named `layer`."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(size, size, bias=False, device=device, dtype=dtype))
    return model


def layer_steps(arms: list[str], size: int, rank: int, tokens: int, dtype: torch.dtype, device: torch.device) -> dict:
    """A LayerStep for each arm, or FAILED."""
    base = one_layer(size, dtype, device)
    return prepare(arms, lambda name: LayerStep(build(name, base, ["layer"], rank), tokens, size, dtype, device), device)


def measure(settings: BenchSettings, progress: Progress = silent) -> dict:
    """{dtype: {rank: {side of the layer: {"arms": seconds, "ratios"}}}}."""
    dtype, device = settings.dtypes[-1], settings.torch_device()
    result = {}
    for rank in settings.ranks:
        for size in settings.layer_sizes:
            steps = layer_steps(settings.arms, size, rank, settings.tokens, torch_dtype(dtype), device)
            total = (settings.warm_up + settings.rounds) * len(steps)
            with progress(f"layer {dtype} rank {rank}, {size} x {size}", total) as advance:
                series = interleave(steps, settings.rounds, settings.warm_up, device, advance)
            result.setdefault(str(rank), {})[str(size)] = summary(series, RATIOS)
    return {dtype: result}
