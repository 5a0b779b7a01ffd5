"""HQQ (`HQQLinear`): W = (q − zero)·scale in groups along the rows (axis 1) or the columns (axis 0), q in 1 to 8 bits.

Packed along the first dimension of the groups: with 4 bits group r shares its bytes with group r + half. Rows of W are whole
groups on axis 1, so their numbers are picked out and dequantized alone; other layouts are dequantized whole for each tile.

Cost: a tile of rows (axis 1; 1, 2, 4 and 8 bits), else one dense copy while a tile is made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .opaque import OpaqueBase, Storage

_BITS = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "1bit_u8": 1}


def is_hqq(module: nn.Module) -> bool:
    return any(cls.__name__ == "HQQLinear" and cls.__module__.startswith("hqq.") for cls in type(module).__mro__)


def rows(module: nn.Module, which: Tensor | slice) -> Tensor:
    """Rows of W (K, I) in HQQ's compute dtype."""
    meta, size = module.meta, module.meta["group_size"]
    sliced = meta["axis"] == 1 and meta["packing"] in _BITS and "zero" in meta and not meta["view_as_float"]
    if not sliced or not size or meta["shape"][1] % size:
        return module.dequantize()[which]
    bits, groups = _BITS[meta["packing"]], meta["shape"][1] // size
    index = torch.arange(meta["shape"][0], device=module.W_q.device)[which]
    group = (index[:, None] * groups + torch.arange(groups, device=index.device)).flatten()
    place = group // len(module.W_q)  # which of a byte's parts: the highest bits hold the first
    q = module.W_q.data[group % len(module.W_q)] >> (8 - bits * (place + 1)).to(torch.uint8)[:, None]
    q = (q & (2**bits - 1)).to(meta.get("compute_dtype", torch.float16))
    return ((q - meta["zero"][group]) * meta["scale"][group]).view(len(index), -1)


class HQQStorage(Storage):
    def __reduce__(self):
        return "STORAGE"


STORAGE = HQQStorage("HQQ", is_hqq, rows)


class HQQBase(OpaqueBase):
    rank = 50

    def __init__(self, kind, storage: Storage = STORAGE):
        super().__init__(kind, storage)

    @classmethod
    def of(cls, kind, module: nn.Module) -> HQQBase | None:
        return cls(kind) if kind.may_be_quantized and is_hqq(module) else None

    @classmethod
    def makes_linear(cls, module: nn.Module) -> bool:
        return is_hqq(module)

    def ready(self, module: nn.Module) -> str | None:
        return None if getattr(module, "meta", None) is not None else "its weight is not quantized yet; call its initialize() first"

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return tuple(module.meta["shape"]) if getattr(module, "meta", None) is not None else super().shape(module)

    def tile_rows(self, module: nn.Module) -> int:
        """All rows at once where each tile would dequantize the whole."""
        whole = module.meta["axis"] != 1 or module.meta["packing"] not in _BITS
        return self.shape(module)[0] if whole else super().tile_rows(module)

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        return {"W_q": module.W_q} | {key: value for key, value in module.meta.items() if isinstance(value, Tensor)}

    def requantize_refusal(self, module: nn.Module) -> str | None:
        return None if getattr(module, "quant_config", None) else "HQQ's layer does not hold its quant_config"

    def requantized(self, module: nn.Module, weight_OI: Tensor) -> None:
        plain = next(cls for cls in type(module).__mro__ if cls.__name__ == "HQQLinear")
        settings = {**module.quant_config, "offload_meta": module.offload_meta}
        device, dtype = str(self.device(module)), self.dtype(module)
        new = plain.from_weights(weight_OI.to(dtype), None, settings, compute_dtype=dtype, device=device)
        module.W_q, module.meta = new.W_q, new.meta


STORAGES = (HQQBase,)
