"""bitsandbytes: nf4 and fp4 (`Linear4bit`), with and without double quantization, and int8 (`Linear8bitLt`).

    4 bit   W = code[q] · absmax of its block of 64 numbers, blocks counted along the rows
    8 bit   W = q · SCB_o / 127; the forward on CUDA rounds the activations to 8 bits too, so U comes from row tiles

Rows are dequantized by bitsandbytes itself, on slices of the packed numbers that start and end where a block does. On CPUs
with AVX512-BF16 its 4-bit layer repacks its weight in the first evaluation, rounds the scales, and has no gradient from then on.
An adapted layer is kept from doing so; one that has is read as it is.

Cost: a tile of rows, and with double quantization the scales (1/64 of W's numbers) in fp32 each time rows are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .quantized import QuantizedBase

_PACKING = "support_avx512bf16_for_cpu"
_PACKED_ROWS = 32


def _weight_class(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    return type(weight).__name__ if type(weight).__module__.startswith("bitsandbytes.") else ""


class Bnb4bit(QuantizedBase):
    name = "bitsandbytes 4 bit"

    @staticmethod
    def matches(kind, module: nn.Module) -> bool:
        return kind.may_be_quantized and _weight_class(module) == "Params4bit"

    def state(self, module: nn.Module):
        """The QuantState; a wrapper that makes parameters anew (FSDP) leaves it on the module only."""
        return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)

    def ready(self, module: nn.Module) -> str | None:
        if self.state(module) is None and module.weight.device.type != "meta":
            return "its weight is not quantized yet; move the model to its device first"
        return None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        state = self.state(module)
        return super().shape(module) if state is None else tuple(state.shape)

    def dtype(self, module: nn.Module) -> torch.dtype:
        state = self.state(module)
        return module.compute_dtype or (torch.float32 if state is None else state.dtype)

    def device(self, module: nn.Module) -> torch.device:
        return module.weight.device

    def version(self, module: nn.Module) -> tuple:
        return super().version(module), self.dtype(module)

    def held(self, module: nn.Module) -> tuple[Tensor, ...]:
        state = self.state(module)
        scales = (state.absmax, state.state2.absmax) if state.nested else (state.absmax,)
        return module.weight.data, *scales

    def forward_rows(self, module: nn.Module, rows_KI: Tensor) -> Tensor:
        import bitsandbytes

        state = self.state(module)
        weight = module.weight if _packed(state) else module.weight.t()  # what its own forward hands over
        return bitsandbytes.matmul_4bit(rows_KI.to(self.dtype(module)), weight, quant_state=state)

    def rows(self, module: nn.Module, which: Tensor | slice) -> Tensor:
        state, columns = self.state(module), self.shape(module)[1]
        numbers = module.weight.data.view(torch.uint8).flatten()
        if _packed(state):
            return _rows_packed_for_cpu(numbers, state, which)
        if columns % state.blocksize and numbers.device.type == "cpu":
            return _whole(module.weight.data, state)[which]
        scales = _scales(state)
        if isinstance(which, slice):
            return _range(numbers, scales, state, which.start * columns, which.stop * columns).view(-1, columns)
        if columns % state.blocksize == 0:
            scales = scales.view(-1, columns // state.blocksize)[which].flatten()
            return _dequantized(numbers.view(-1, columns // 2)[which].flatten(), scales, state).view(-1, columns)
        starts = (row * columns for row in which.tolist())
        return torch.stack([_range(numbers, scales, state, start, start + columns) for start in starts])

    def adopt(self, module: nn.Module) -> None:
        if getattr(module, "quant_state", None) is None:  # where bitsandbytes looks once FSDP made the parameter anew
            module.quant_state = self.state(module)
        if getattr(module, _PACKING, False):
            setattr(module, _PACKING, False)
            self.packing = True

    def release(self, module: nn.Module) -> None:
        if vars(self).pop("packing", False):
            setattr(module, _PACKING, True)

    def requantize_refusal(self, module: nn.Module) -> str | None:
        state = self.state(module)
        if _packed(state):
            return "bitsandbytes has repacked it for evaluation on CPU"
        if self.shape(module)[1] % state.blocksize and module.weight.device.type == "cpu":
            return f"its {self.shape(module)[1]} columns are no whole blocks of {state.blocksize}, which CPU kernels misread"
        return None

    def requantized(self, module: nn.Module, weight_OI: Tensor) -> None:
        old, state = module.weight, self.state(module)
        new = type(old)(
            weight_OI.to(state.dtype),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.dtype,
            module=module,
        )
        module.weight = new.to(old.device)  # sets module.quant_state


class Bnb8bit(QuantizedBase):
    name = "bitsandbytes 8 bit"
    exact_forward = False

    @staticmethod
    def matches(kind, module: nn.Module) -> bool:
        return kind.may_be_quantized and _weight_class(module) == "Int8Params"

    def ready(self, module: nn.Module) -> str | None:
        if module.state.has_fp16_weights:
            return "it quantizes a 16-bit weight in each forward; make it with has_fp16_weights=False"
        if module.weight.dtype != torch.int8 and module.weight.device.type != "meta":
            return "its weight is not quantized yet; move the model to its device first"
        return None

    def scales(self, module: nn.Module) -> Tensor:
        """SCB (O,): on the weight until the first forward, then on the layer's state."""
        return module.weight.SCB if getattr(module.weight, "SCB", None) is not None else module.state.SCB

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The bias's, since nothing else tells what the model computes in; without one the dtype that the kernel rounds to."""
        return torch.float16 if module.bias is None else module.bias.dtype

    def model_dtype(self, module: nn.Module) -> torch.dtype | None:
        return None if module.bias is None else module.bias.dtype

    def device(self, module: nn.Module) -> torch.device:
        return module.weight.device

    def held(self, module: nn.Module) -> tuple[Tensor, ...]:
        return module.weight.data, self.scales(module)

    def forward_rows(self, module: nn.Module, rows_KI: Tensor) -> Tensor:
        import bitsandbytes

        state = bitsandbytes.MatmulLtState()
        state.has_fp16_weights, state.is_training = False, module.training
        state.CB, state.SCB = module.weight.data, self.scales(module)
        return bitsandbytes.matmul(rows_KI, module.weight, state=state, threshold=module.state.threshold)

    def rows(self, module: nn.Module, which: Tensor | slice) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(module.weight.data[which], self.scales(module)[which])

    def requantize_refusal(self, module: nn.Module) -> None:
        return None

    def requantized(self, module: nn.Module, weight_OI: Tensor) -> None:
        import bitsandbytes

        old, state = module.weight, bitsandbytes.MatmulLtState()
        state.threshold, state.has_fp16_weights, state.use_pool = module.state.threshold, False, module.state.use_pool
        new = type(old)(weight_OI.cpu(), requires_grad=False, has_fp16_weights=False)
        module.weight, module.state = new.to(old.device), state


def _packed(state) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _scales(state) -> Tensor:
    """absmax of every block in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax.float()
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def _whole(numbers: Tensor, state) -> Tensor:
    """All of W at once: some CPU kernels (of 0.50) misread rows that do not end where a block does, in the layer's forward too, so
    that only the whole matrix gives the weight that the layer multiplies with."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(numbers, state)


def _range(numbers: Tensor, scales: Tensor, state, start: int, stop: int) -> Tensor:
    """Numbers start … stop of W laid out flat, dequantized from the first block that holds one of them to the last."""
    size, total = state.blocksize, state.shape[0] * state.shape[1]
    first, last = start // size, -(-stop // size)
    end = min(last * size, total)
    flat = _dequantized(numbers[first * size // 2 : (end + 1) // 2], scales[first:last], state, end - first * size)
    return flat[start - first * size : stop - first * size]


def _dequantized(numbers: Tensor, scales: Tensor, state, count: int | None = None) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    shape = torch.Size((1, 2 * len(numbers) if count is None else count))
    part = QuantState(scales.contiguous(), shape, state.code, state.blocksize, state.quant_type, state.dtype)
    return dequantize_4bit(numbers.view(-1, 1), part).flatten()


def _rows_packed_for_cpu(numbers: Tensor, state, which: Tensor | slice) -> Tensor:
    """Rows of a weight that was repacked for CPU: 32 rows share their bytes, the first 16 in the low halves; absmax (blocks, O)."""
    rows, columns = state.shape
    index = torch.arange(rows)[which] if isinstance(which, slice) else which
    in_block = index % _PACKED_ROWS
    blocks = numbers.view(rows // _PACKED_ROWS, columns // 2, _PACKED_ROWS // 2, 2)
    pairs = blocks[index // _PACKED_ROWS, :, in_block % 16]
    codes = torch.where((in_block < 16)[:, None, None], pairs & 0xF, pairs >> 4).flatten(1)
    scales = state.absmax.float().T[index].repeat_interleave(state.blocksize, 1)[:, :columns]
    return state.code.float()[codes.int()] * scales


STORAGES = (Bnb4bit, Bnb8bit)
