"""LoRA's direction: A (R, I) Kaiming-uniform with a = sqrt 5, that is U(−1/√I, 1/√I); B (O, R) zero (§3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoRADirection:
    def create(self, module: nn.Module, shape: tuple[int, int], rank: int, seed: int, dtype, device) -> None:
        out_features, in_features = shape
        generator = torch.Generator().manual_seed(seed)
        bound = in_features**-0.5 if in_features else 0.0
        A_RI = torch.empty(rank, in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
        module.register_parameter("lora_A", nn.Parameter(A_RI.to(device)))
        module.register_parameter("lora_B", nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device)))

    def names(self) -> tuple[str, ...]:
        return "lora_A", "lora_B"

    def factors(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        return module.lora_A, module.lora_B


class NoDirection:
    """Magnitude only (§5.6): no A, no B."""

    def create(self, module: nn.Module, shape, rank, seed, dtype, device) -> None:
        module.register_parameter("lora_A", None)
        module.register_parameter("lora_B", None)

    def names(self) -> tuple[str, ...]:
        return ()

    def factors(self, module: nn.Module) -> tuple[None, None]:
        return None, None


LORA = LoRADirection()
NONE = NoDirection()
