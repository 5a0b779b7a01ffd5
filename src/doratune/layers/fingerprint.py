"""The net under the version counters: an integer hash of the parameters of many weights, in a few operations for all of them.

Version counters alone are unsound: fused AdamW, `.data` writes (an EMA swap) and custom ops change a parameter and bump nothing.

    full     every bit of A, B, m (and what other directions train) and of biases
    light    of large ones evenly spread numbers, in calls of few tokens without gradients: a swap changes nearly all numbers
    of W     a few numbers of each frozen weight

The hash is a dot product of the bits with fixed odd multipliers modulo 2**64, so position counts.

Cost: one read of the parameters in chunks that stay in the cache, 0.2 ms for 3·10⁵ numbers on one CPU core. The host reads nothing.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

CHUNK_NUMBERS, OTHER_CHUNK = 2**18, 2**24
"""Numbers that are hashed at once on a CPU, and elsewhere."""

SMALL, SPREAD_NUMBERS = 2**11, 64
"""Tensors up to this size are light as they are; of others this many numbers are."""

Print = dict[torch.device, Tensor]
"""Integers (K,) on each device."""


class Watched:
    """The tensors of some weights, as flat views that are made once while they stay where they are."""

    def __init__(self, weights: list):
        self.slots = [slot for weight in weights for slot in weight.slots()]
        self.frozen = [slot for weight in weights if (slot := weight.frozen_slot()) is not None]
        self.addresses: list[int] = []
        self.full = self.light = self.of_W = ()

    def look(self) -> bool:
        """Find the tensors; False: they are of a function transform, and their numbers cannot be looked at."""
        tensors = [t for t in map(tensor_in, self.slots) if t is not None]
        frozen = [t for t in map(tensor_in, self.frozen) if t is not None]
        addresses = [t.data_ptr() for t in (*tensors, *frozen)]
        if addresses != self.addresses or 0 in addresses:
            if any(wrapped(t) for t in tensors):
                return False
            self.full = _chunks([_flat(t) for t in tensors])
            self.light = _chunks([_spread(t, SMALL, SPREAD_NUMBERS) for t in tensors])
            self.of_W = _chunks([_spread(t, 0, 16) for t in frozen])
            self.addresses = addresses
        return True

    def print(self, light: bool) -> Print:
        return _hashed(self.light if light else self.full)

    def print_of_W(self) -> Print:
        return _hashed(self.of_W)


def tensor_in(slot) -> Tensor | None:
    """slot: (the dict or the module that holds it, its name). Of a tensor in shards, this process's part."""
    holder, name = slot
    t = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
    return getattr(t, "_local_tensor", t)


def together(a: Print, b: Print) -> Print:
    """Two fingerprints as one."""
    return {device: torch.cat([p[device] for p in (a, b) if device in p]) for device in a | b}


def same(a: Print, b: Print) -> bool:
    """Are two fingerprints equal? Reads each device once."""
    return a.keys() == b.keys() and all(torch.equal(a[device], b[device]) for device in a)


def identity(t: Tensor | None) -> tuple:
    """Where a tensor's numbers are, and their version where they have one."""
    return (0, 0) if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version)


def wrapped(t: Tensor) -> bool:
    """Is it a tensor of a function transform (vmap, grad)?"""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)


def _flat(t: Tensor) -> Tensor:
    return t.detach().reshape(-1)


def _spread(t: Tensor, small: int, numbers: int) -> Tensor:
    t = t.detach()
    if t.numel() <= max(small, numbers) or not t.is_contiguous():
        return t.reshape(-1) if t.numel() <= small or t.is_contiguous() else t[tuple(slice(0, None, 1 + n // 4) for n in t.shape)]
    return t.as_strided((numbers,), (t.numel() // numbers,), t.storage_offset())


def _chunks(views: list[Tensor]) -> list[list[Tensor]]:
    """Views of one dtype and device, about one chunk of numbers each. A tensor that is no flat view is a chunk of its own."""
    groups: dict[tuple, list[list[Tensor]]] = {}
    sizes: dict[tuple, int] = {}
    for view in views:
        key = (view.device, view.dtype) if view.dim() == 1 else (view.device, view.dtype, view)
        limit = CHUNK_NUMBERS if view.device.type == "cpu" else OTHER_CHUNK
        for part in view.split(limit) if view.dim() == 1 else [view]:
            if key not in groups or sizes[key] + part.numel() > limit:
                groups.setdefault(key, []).append([])
                sizes[key] = 0
            groups[key][-1].append(part)
            sizes[key] += part.numel()
    return [chunk for chunks in groups.values() for chunk in chunks]


def _hashed(chunks: list[list[Tensor]]) -> Print:
    hashes: dict[torch.device, list[Tensor]] = {}
    for chunk in chunks:
        flat = torch.cat(chunk) if len(chunk) > 1 else chunk[0].reshape(-1)
        hashes.setdefault(flat.device, []).append(_hash(flat))
    return {device: torch.stack(parts) for device, parts in hashes.items()}


def _hash(flat: Tensor) -> Tensor:
    """The top bit alone would vanish where an even number of signs flip, so the upper half is mixed into the lower one first."""
    if flat.element_size() < 4:
        flat = flat.float()
    if flat.numel() * flat.element_size() % 8:
        flat = torch.cat([flat, flat.new_zeros(1)])
    elif flat.storage_offset() * flat.element_size() % 8 or flat.stride(0) != 1:
        flat = flat.clone()
    bits = flat.view(torch.int64)
    bits = bits ^ (bits >> 32)
    multipliers = _multipliers(max(2**15, 1 << len(bits).bit_length()), bits.device)[: len(bits)]
    return torch.dot(bits, multipliers) if bits.device.type == "cpu" else (bits * multipliers).sum()


@lru_cache(maxsize=32)
def _multipliers(size: int, device: torch.device) -> Tensor:
    """Fixed random odd integers, only ever read."""
    with torch.inference_mode(False):
        info, generator = torch.iinfo(torch.int64), torch.Generator().manual_seed(1)
        return (torch.randint(info.min, info.max, (size,), dtype=torch.int64, generator=generator) | 1).to(device)
