"""VeRA's direction (§5.4; Kopiczko et al., ICLR 2024): frozen random A and B, shared by all layers; trained are two vectors.

    ΔV = diag(b)·B·diag(d)·A        b (O,) starts at 0, d (R,) at 0.1; A (R, I), B (O, R) cut out of one largest pair

With a magnitude it is DVoRA. A and B come from a seed and need not be saved (PEFT's `projection_prng_key`, drawn as PEFT draws
them) or from a file. No A is trained, so the backward needs neither dA nor x.

Cost: a copy of B (O, R) scaled by b and d for each forward; the shared pair R·(max I + max O) numbers once per device and dtype.
With `norm_memory` in the configuration, U = W·Aᵀ (O, R) of as many layers as fit is kept: no product with W after the first step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import Declared, Direction

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


class VeRADirection(Direction):
    """shared: the frozen pair of one attachment; None in the declaration."""

    name = "vera"
    methods = {"vera": False, "dvora": True}
    tensors = (
        Declared("vera_b", lambda O, I, R: (O,), output_factor=True, in_file="vera_lambda_b"),
        Declared("vera_d", lambda O, I, R: (R,), in_file="vera_lambda_d"),
    )
    scaled = False
    overrides = False
    shared_names = ("vera_A", "vera_B")
    peft_type = "VERA"
    peft_kinds = ("Linear", "Conv1D")

    def __init__(self, shared: SharedFactors | None = None):
        self.shared = shared

    def for_model(self, config, shapes) -> Direction:
        if not shapes:
            return self
        rows, columns = (max(shape[i] for shape in shapes) for i in (0, 1))
        return VeRADirection(SharedFactors(config.rank, rows, columns, config.seed))

    def create(self, module, shape, rank, seed, dtype, device) -> None:
        super().create(module, shape, rank, seed, dtype, device)
        self.shared.get(torch.device(device), dtype)  # drawn here, not under torch.compile

    def first(self, name, size, shape, dtype, generator) -> Tensor:
        return torch.full(size, FIRST_D if name == "vera_d" else 0.0, dtype=dtype)

    def factors(self, tensors, shape) -> tuple[Tensor, Tensor]:
        b, d = tensors
        A, B = self.shared.get(b.device, b.dtype)
        return A[:, : shape[1]], B[: shape[0]] * b[:, None] * d

    def needs(self, needed) -> tuple[bool, bool]:
        return False, any(needed)

    def refusal(self, shape, rank) -> None:
        return None

    def constant_A(self) -> bool:
        return True

    def shared_A(self, shape, device, dtype) -> Tensor | None:
        return None if self.shared is None else self.shared.get(device, dtype)[0][:, : shape[1]]

    def shared_tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.shared_names, self.shared.get(torch.device("cpu"), torch.float32), strict=True))

    def take_shared(self, tensors: dict[str, Tensor]) -> None:
        if len(tensors) == len(self.shared_names):
            self.shared.give(*(tensors[name] for name in self.shared_names))

    def shared_problem(self, tensors, shapes, rank) -> str | None:
        """One of the pair alone, or one that is too small; none at all is drawn from the seed."""
        if not tensors or not shapes:
            return None
        if missing := [name for name in self.shared_names if name not in tensors]:
            return f"{missing[0]} is missing beside {next(iter(tensors))}"
        rows, columns = (max(shape[i] for shape in shapes) for i in (0, 1))
        A, B = (tuple(tensors[name].shape) for name in self.shared_names)
        if len(A) == len(B) == 2 and A[0] == B[1] == rank and A[1] >= columns and B[0] >= rows:
            return None
        return f"vera_A {A} and vera_B {B} do not fit; the model needs ({rank}, {columns}) and ({rows}, {rank})"


DIRECTIONS = (VeRADirection(),)
