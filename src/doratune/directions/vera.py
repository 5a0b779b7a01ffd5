"""VeRA's direction (§5.4; Kopiczko et al., ICLR 2024): frozen random A and B, shared by all layers; trained are two vectors.

    ΔV = diag(b)·B·diag(d)·A        b (O,) starts at 0, d (R,) at 0.1; A (R, I), B (O, R) cut out of one largest pair

With a magnitude it is DVoRA. A and B come from a seed and need not be saved (PEFT's `projection_prng_key`, drawn as PEFT draws
them) or from a file. No A is trained, so the backward needs neither dA nor x.

Cost: a copy of B (O, R) scaled by b and d for each forward; the shared pair R·(max I + max O) numbers once per device. With
`norm_memory` in the configuration, U = W·Aᵀ (O, R) of as many layers as fit is kept: no product with W after the first step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import register

FIRST_D = 0.1


class SharedFactors:
    """The frozen pair of all VeRA layers of a model: A (R, max I), B (max O, R), drawn on first use, one copy per device."""

    def __init__(self, rank: int, rows: int, columns: int, seed: int, given: tuple[Tensor, Tensor] | None = None):
        self.rank, self.rows, self.columns, self.seed = rank, rows, columns, seed
        self.given, self._copies = given, {}

    def get(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if (device, dtype) not in self._copies:
            with torch.inference_mode(False):
                self._copies[device, dtype] = tuple(t.to(device, dtype) for t in self.given or self._drawn())
        return self._copies[device, dtype]

    def give(self, A: Tensor, B: Tensor) -> None:
        """Take this pair (from a file) instead of the drawn one."""
        if self.given is None or self.given[0] is not A:
            self.given, self._copies = (A, B), {}

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Kaiming-uniform: U(−√(6/fan in), √(6/fan in)); A first, then B, from one CPU generator."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(rows: int, columns: int) -> Tensor:
            bound = math.sqrt(6 / columns)
            return torch.empty(rows, columns, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)

        return draw(self.rank, self.columns), draw(self.rows, self.rank)

    def __deepcopy__(self, memo):
        """One pair for all layers of the copy; the tensors, which are never written to, are shared."""
        copied = memo[id(self)] = SharedFactors(self.rank, self.rows, self.columns, self.seed, self.given)
        copied._copies = dict(self._copies)
        return copied

    def __reduce__(self):
        return SharedFactors, (self.rank, self.rows, self.columns, self.seed, self.given)


class VeRADirection:
    name = "vera"
    names = ("vera_b", "vera_d")
    frozen = ()

    def __init__(self, shared: SharedFactors):
        self.shared = shared

    def create(self, module: nn.Module, shape: tuple[int, int], rank: int, seed: int, dtype, device) -> None:
        register(module, "vera_b", torch.zeros(shape[0], dtype=dtype), device)
        register(module, "vera_d", torch.full((rank,), FIRST_D, dtype=dtype), device)
        self.shared.get(torch.device(device), dtype)  # drawn here, not under torch.compile

    def factors(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        b, d, base = module.vera_b, module.vera_d, module.adaptation.base
        rows, columns = base.shape(module)
        A, B = self.shared.get(b.device, b.dtype)
        return A[:, :columns], B[:rows] * b[:, None] * d

    def sources(self, module: nn.Module) -> tuple[Tensor, ...]:
        return module.vera_b, module.vera_d

    def shapes(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
        return {"vera_b": (shape[0],), "vera_d": (rank,)}

    def refusal(self, shape: tuple[int, int], rank: int) -> str | None:
        return None
