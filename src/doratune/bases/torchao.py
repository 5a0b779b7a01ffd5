"""torchao: weights of `nn.Linear` that are quantized tensor subclasses: int8, intx, int4, float8.

W is what `weight.dequantize()` gives; a slice of rows is again such a tensor and is dequantized alone. A subclass that cannot be
sliced is dequantized whole for each tile: one dense copy while it is made. Activations may be rounded too.

Cost: a tile of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError
from .quantized import QuantizedBase

_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_quant_scale")
"""Attributes of a weight that say how activations are rounded; none: weight only."""


class TorchaoBase(QuantizedBase):
    name = "torchao"

    def __init__(self, kind):
        super().__init__(kind)
        self.slices = True

    @staticmethod
    def matches(kind, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        named = kind.may_be_quantized and isinstance(weight, Tensor) and type(weight).__module__.startswith("torchao.")
        return named and hasattr(weight, "dequantize")

    def dtype(self, module: nn.Module) -> torch.dtype:
        return module.weight.dtype

    def device(self, module: nn.Module) -> torch.device:
        return module.weight.device

    def version(self, module: nn.Module) -> tuple:
        return super().version(module), self.device(module)

    def held(self, module: nn.Module) -> tuple[Tensor, ...]:
        return tuple(inner_tensors(module.weight))

    def forward_rows(self, module: nn.Module, rows_KI: Tensor) -> Tensor:
        return nn.functional.linear(rows_KI.to(self.dtype(module)), module.weight)

    def rows(self, module: nn.Module, which: Tensor | slice) -> Tensor:
        weight = module.weight.detach()
        if not self.slices:
            return weight.dequantize()[which]
        if isinstance(which, slice):
            return weight[which].dequantize()
        return torch.cat([weight[row : row + 1].dequantize() for row in which.tolist()])  # few, and not all take an index

    def trial(self, module: nn.Module) -> str | None:
        weight = module.weight.detach()
        if weight.device.type != "meta":
            try:
                self.slices = weight[: min(2, len(weight))].dequantize().shape[1] == weight.shape[1]
            except Exception:  # a subclass without slicing raises what it likes
                self.slices = False
        self.exact_forward = not any(getattr(weight, name, None) is not None for name in _ACTIVATIONS)
        return super().trial(module)

    def requantize_refusal(self, module: nn.Module) -> str | None:
        try:
            _config(module.weight)
        except UserError as error:
            return str(error)
        return None

    def requantized(self, module: nn.Module, weight_OI: Tensor) -> None:
        from torchao.quantization import quantize_

        rows, columns = weight_OI.shape
        shell = nn.Linear(columns, rows, bias=False, device="meta")
        shell.weight = nn.Parameter(weight_OI.to(self.dtype(module)), requires_grad=False)
        quantize_(shell, _config(module.weight))
        module.weight = shell.weight


def inner_tensors(weight: Tensor):
    """The tensors that a subclass is made of."""
    for name in weight.__tensor_flatten__()[0]:
        inner = getattr(weight, name)
        yield from inner_tensors(inner) if hasattr(inner, "__tensor_flatten__") else (inner,)


def _config(weight: Tensor):
    """torchao's configuration that makes such a weight: the tensor keeps none, so only those are known that it shows plainly.

    Raises:
        UserError: it does not show it.
    """
    from torchao import quantization

    kind, block = type(weight).__name__, tuple(getattr(weight, "block_size", ()))
    plain = not any(getattr(weight, name, None) is not None for name in _ACTIVATIONS)
    if plain and block == (1, weight.shape[1]) and kind in ("Int8Tensor", "Float8Tensor"):
        return quantization.Int8WeightOnlyConfig() if kind == "Int8Tensor" else quantization.Float8WeightOnlyConfig()
    if plain and kind == "IntxUnpackedToInt8Tensor" and block[:1] == (1,):
        whole = block[1] == weight.shape[1]
        granularity = quantization.PerAxis(0) if whole else quantization.PerGroup(block[1])
        return quantization.IntxWeightOnlyConfig(weight_dtype=weight.target_dtype, granularity=granularity)
    raise UserError(f"torchao's {kind} does not say how it was made")


STORAGES = (TorchaoBase,)
