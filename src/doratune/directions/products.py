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
from torch import Tensor

from . import Declared, Direction


def _B(O, I, R):
    return O, R


def _A(O, I, R):
    return R, I


class LoHaDirection(Direction):
    name = "loha"
    methods = {"loha": False, "dloha": True}
    tensors = (
        Declared("hada_w1_a", _B),
        Declared("hada_w1_b", _A),
        Declared("hada_w2_a", _B, output_factor=True),
        Declared("hada_w2_b", _A),
    )

    def first(self, name, size, shape, dtype, generator) -> Tensor:
        spread = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
        return spread[name] * torch.randn(size, generator=generator, dtype=dtype)

    def width(self, shape, rank) -> int:
        return rank * rank

    def factors(self, tensors, shape) -> tuple[Tensor, Tensor]:
        B1, A1, B2, A2 = tensors
        A = (A1[:, None] * A2[None]).flatten(0, 1)
        return A, (B1[:, :, None] * B2[:, None]).flatten(1)

    def __reduce__(self):
        return "LOHA"


class LoKrDirection(Direction):
    name = "lokr"
    methods = {"lokr": False, "dlokr": True}
    tensors = (
        Declared("lokr_w1", lambda O, I, R: (_split(O)[0], _split(I)[0])),
        Declared("lokr_w2_a", lambda O, I, R: (_split(O)[1], R)),
        Declared("lokr_w2_b", lambda O, I, R: (R, _split(I)[1]), output_factor=True),
    )

    def first(self, name, size, shape, dtype, generator) -> Tensor:
        bound = 0.0 if name == "lokr_w2_b" else size[1] ** -0.5
        return torch.empty(size, dtype=dtype).uniform_(-bound, bound, generator=generator)

    def factors(self, tensors, shape) -> tuple[Tensor, Tensor]:
        C, B2, A2 = tensors
        A = torch.kron(torch.eye(C.shape[1], dtype=A2.dtype, device=A2.device), A2)
        return A, torch.kron(C, B2)

    def width(self, shape, rank) -> int:
        return _split(shape[1])[0] * rank

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
DIRECTIONS = (LOHA, LOKR)
