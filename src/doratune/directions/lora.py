"""LoRA's direction: A (R, I) Kaiming-uniform with a = sqrt 5, that is U(−1/√I, 1/√I); B (O, R) zero (§3.1). And none at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import register, too_large


class LoRADirection:
    name = "lora"
    names = ("lora_A", "lora_B")
    frozen = ()

    def create(self, module: nn.Module, shape: tuple[int, int], rank: int, seed: int, dtype, device) -> None:
        out_features, in_features = shape
        generator = torch.Generator().manual_seed(seed)
        bound = in_features**-0.5 if in_features else 0.0
        A_RI = torch.empty(rank, in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
        register(module, "lora_A", A_RI, device)
        register(module, "lora_B", torch.zeros(out_features, rank, dtype=dtype), device)

    def factors(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        return module.lora_A, module.lora_B

    sources = factors

    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (rank, shape[1]), "lora_B": (shape[0], rank)}

    def refusal(self, shape: tuple[int, int], rank: int) -> str | None:
        return too_large(shape, rank)

    def __reduce__(self):
        return "LORA"


class NoDirection:
    """Magnitude only (§5.6): no A, no B."""

    name = "none"
    names = ("lora_A", "lora_B")
    frozen = ()

    def create(self, module: nn.Module, shape, rank, seed, dtype, device) -> None:
        register(module, "lora_A", None, device)
        register(module, "lora_B", None, device)

    def factors(self, module: nn.Module) -> tuple[None, None]:
        return None, None

    def sources(self, module: nn.Module) -> tuple:
        return ()

    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        return {}

    def refusal(self, shape: tuple[int, int], rank: int) -> str | None:
        return None

    def __reduce__(self):
        return "NONE"


LORA = LoRADirection()
NONE = NoDirection()
