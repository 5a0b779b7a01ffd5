"""LoHa and LoKr (LyCORIS; FedPara, KronA): products of small matrices, written as one pair of factors.

    LoHa   ΔV = (B₁A₁) ⊙ (B₂A₂)   = B·A with rows B_o = B₁_o ⊗ B₂_o and columns A_i = A₁_i ⊗ A₂_i: rank R²
    LoKr   ΔV = C ⊗ (B₂A₂)        = (C ⊗ B₂)·(I ⊗ A₂): rank (columns of C)·R

So the norm, the gradients and the merge are the common ones, exact and without an O×I matrix. The start is LyCORIS's: the
last factor is 0, the others normal or Kaiming-uniform.

Cost: LoHa's pair has R²·(O + I) numbers and its products as many per token; LoKr's k·R·(O + I) with k the divisor of I
nearest below its square root (LyCORIS's factor −1). Small ranks (up to 16) are what both are used with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import register, too_large


class LoHaDirection:
    name = "loha"
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    frozen = ()

    def create(self, module: nn.Module, shape: tuple[int, int], rank: int, seed: int, dtype, device) -> None:
        generator = torch.Generator().manual_seed(seed)
        spread = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
        for name, size in self.shapes(shape, rank).items():
            register(module, name, spread[name] * torch.randn(size, generator=generator, dtype=dtype), device)

    def factors(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        B1, A1, B2, A2 = self.sources(module)
        A = (A1[:, None] * A2[None]).flatten(0, 1)
        return A, (B1[:, :, None] * B2[:, None]).flatten(1)

    def sources(self, module: nn.Module) -> tuple[Tensor, ...]:
        return tuple(getattr(module, name) for name in self.names)

    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        B, A = (shape[0], rank), (rank, shape[1])
        return dict(zip(self.names, (B, A, B, A), strict=True))

    def refusal(self, shape: tuple[int, int], rank: int) -> str | None:
        return too_large(shape, rank)

    def __reduce__(self):
        return "LOHA"


class LoKrDirection:
    name = "lokr"
    names = ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
    frozen = ()

    def create(self, module: nn.Module, shape: tuple[int, int], rank: int, seed: int, dtype, device) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, size in self.shapes(shape, rank).items():
            bound = 0.0 if name == "lokr_w2_b" else size[1] ** -0.5
            register(module, name, torch.empty(size, dtype=dtype).uniform_(-bound, bound, generator=generator), device)

    def factors(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        C, B2, A2 = self.sources(module)
        A = torch.kron(torch.eye(C.shape[1], dtype=A2.dtype, device=A2.device), A2)
        return A, torch.kron(C, B2)

    def sources(self, module: nn.Module) -> tuple[Tensor, ...]:
        return tuple(getattr(module, name) for name in self.names)

    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        (out_small, out_large), (in_small, in_large) = (_split(size) for size in shape)
        return {"lokr_w1": (out_small, in_small), "lokr_w2_a": (out_large, rank), "lokr_w2_b": (rank, in_large)}

    def refusal(self, shape: tuple[int, int], rank: int) -> str | None:
        limit = min(_split(shape[0])[1], _split(shape[1])[1])
        return None if rank <= limit else f"LoKr splits it into blocks of which the smaller side is {limit}; rank {rank} is larger"

    def __reduce__(self):
        return "LOKR"


def _split(size: int) -> tuple[int, int]:
    """(small, large) with small·large = size and small the divisor nearest below √size."""
    small = next(k for k in range(math.isqrt(max(1, size)), 0, -1) if size % k == 0)
    return small, size // small


LOHA = LoHaDirection()
LOKR = LoKrDirection()
