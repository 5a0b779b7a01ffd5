"""LoRA's direction: A (R, I) Kaiming-uniform with a = sqrt 5, that is U(−1/√I, 1/√I); B (O, R) zero (§3.1).

    none      magnitude only (§5.6): no A, no B; in a file rank 1 with B = 0
    offset    ΔV = s·(B·A − B₀·A₀) = s·[B, B − B₀]·[A − A₀; A₀], for starts that PiSSA and OLoRA take out of the weight: one pair of
              twice the rank whose products are 0 at the start A = A₀, B = B₀. In a file a LoRA of rank 2R, as PEFT converts such

PiSSA and OLoRA change the frozen weight; here W stays as it is: the output of step 0 is the base's and `detach` gives it back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Declared, Direction

_A = Declared("lora_A", lambda O, I, R: (R, I), in_file="lora_A.weight")
_B = Declared("lora_B", lambda O, I, R: (O, R), output_factor=True, in_file="lora_B.weight")
_A0 = Declared("start_A", lambda O, I, R: (R, I), trained=False)
_B0 = Declared("start_B", lambda O, I, R: (O, R), trained=False)

KINDS = ("Linear", "Conv1D", "Conv", "Embedding")


class LoRADirection(Direction):
    name = "lora"
    methods = {"lora": False, "dora": True}
    tensors = (_A, _B)
    starts = ("zero", "pissa", "olora", "loftq")
    plain = True
    peft_type = "LORA"
    peft_kinds = KINDS

    def for_model(self, config, shapes) -> Direction:
        return OFFSET if config.start in ("pissa", "olora") else self

    def first(self, name, size, shape, dtype, generator) -> Tensor:
        if name == "lora_B":
            return torch.zeros(size, dtype=dtype)
        bound = shape[1] ** -0.5 if shape[1] else 0.0
        return torch.empty(size, dtype=dtype).uniform_(-bound, bound, generator=generator)

    def factors(self, tensors, shape) -> tuple[Tensor, Tensor]:
        return tuple(tensors)

    def needs(self, needed) -> tuple[bool, bool]:
        return tuple(needed)

    def pull_back(self, tensors, shape, dA, dB, needed):
        return dA, dB

    def __reduce__(self):
        return "LORA"


class NoDirection(Direction):
    name = "none"
    plain = True
    peft_type = "LORA"
    peft_kinds = KINDS

    def factors(self, tensors, shape) -> tuple[None, None]:
        return None, None

    def needs(self, needed) -> tuple[bool, bool]:
        return False, False

    def pull_back(self, tensors, shape, dA, dB, needed) -> tuple:
        return ()

    def refusal(self, shape, rank) -> None:
        return None

    def file_shapes(self, shape, rank) -> dict[str, tuple[int, ...]]:
        return LORA.shapes(shape, 1)

    def to_file(self, tensors, shape, device) -> dict[str, Tensor]:
        *stack, rows, columns = shape
        A = torch.zeros(*stack, 1, columns, device=device)
        A[..., 0, 0] = 1.0
        return {"lora_A": A, "lora_B": torch.zeros(*stack, rows, 1, device=device)}

    def of_file(self, tensors, rank) -> dict[str, Tensor]:
        return {}

    def __reduce__(self):
        return "NONE"


class OffsetLoRADirection(Direction):
    name = "lora_offset"
    tensors = (_A, _B, _A0, _B0)
    peft_type = "LORA"
    peft_kinds = KINDS
    file_rank = 2

    def width(self, shape, rank) -> int:
        return 2 * rank

    def first(self, name, size, shape, dtype, generator) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def factors(self, tensors, shape) -> tuple[Tensor, Tensor]:
        A, B, A0, B0 = tensors
        return torch.cat([A - A0, A0]), torch.cat([B, B - B0], 1)

    def needs(self, needed) -> tuple[bool, bool]:
        return needed[0], needed[1]

    def pull_back(self, tensors, shape, dA, dB, needed):
        rank = len(tensors[0])
        dA = dA[:rank] if needed[0] else None
        return dA, dB[:, :rank] + dB[:, rank:] if needed[1] else None, None, None

    def file_shapes(self, shape, rank) -> dict[str, tuple[int, ...]]:
        return LORA.shapes(shape, 2 * rank)

    def to_file(self, tensors, shape, device) -> dict[str, Tensor]:
        A, B, A0, B0 = (tensors[name] for name in self.names)
        return {"lora_A": torch.cat([A - A0, A0], -2), "lora_B": torch.cat([B, B - B0], -1)}

    def of_file(self, tensors, rank) -> dict[str, Tensor]:
        wide = torch.float64 if tensors["lora_A"].dtype == torch.float64 else torch.float32
        A, B = tensors["lora_A"].to(wide), tensors["lora_B"].to(wide)
        A0, B_now = A[..., rank:, :], B[..., :rank]
        return {"lora_A": A[..., :rank, :] + A0, "lora_B": B_now, "start_A": A0, "start_B": B_now - B[..., rank:]}

    def __reduce__(self):
        return "OFFSET"


LORA = LoRADirection()
NONE = NoDirection()
OFFSET = OffsetLoRADirection()
DIRECTIONS = (LORA,)
