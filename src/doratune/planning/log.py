"""A log of allocations: every storage that a piece of work makes, with the operation that made it, the one after which it was
freed, its bytes and what it is for. Nothing is measured: under fake tensors nothing is allocated, and the log is the same.

    live(t) = Σ bytes of storages with birth ≤ t ≤ death        peak = max over the operations of a stretch

Source: PyTorch's dispatch modes; a storage dies when its last reference does. What a single operation needs inside is not seen.
Cost: some microseconds an operation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER = "weights", "adapters", "gradients", "optimizer"
CASTS, FACTORS, ACTIVATIONS, LOGITS, TEMPORARIES = "casts", "factors", "activations", "logits", "temporaries"
IMAGES = "images"

TERMS = {
    WEIGHTS: "the base model's parameters and buffers, as they are stored",
    ADAPTERS: "what is trained beside the base: A, B, m in float32; modules trained whole",
    FACTORS: "A, s·g·B and the gains, prepared once a step for all calls",
    CASTS: "copies of float32 weights in the dtype of autocast, kept until the backward",
    GRADIENTS: "of what is trained, in its dtype",
    OPTIMIZER: "its state",
    ACTIVATIONS: "what the layers keep for the backward",
    LOGITS: "what has an entry for each word of the vocabulary, or class of a pixel: logits, float32 copies, gradients",
    IMAGES: "the images of the batch and their masks, as the model is given them",
    TEMPORARIES: "all else that is alive at the peak: gradients of activations, dequantized weights, a recomputed layer",
}
"""Term → what it holds."""


@dataclass(eq=False)
class Allocation:
    """One allocation."""

    kind: str
    size: int
    birth: int
    death: int | None = None


class AllocationLog(TorchDispatchMode):
    """Watches the operations inside its block; tensors from before belong to it once they are named (`own`).

    Args:
        vocabulary: the size of dimension `dim` of what counts as logits.
        least: numbers that it must have at least (the vocabulary's own tables have fewer columns than tokens have rows).
    """

    def __init__(self, vocabulary: int, least: int = 0, dim: int = -1):
        super().__init__()
        self.vocabulary, self.least, self.dim = vocabulary, least, dim
        self.storages: list[Allocation] = []
        self.operations = 0
        self.flops = 0
        """Floating-point operations of products, convolutions and attention."""
        self._alive: dict[int, tuple[weakref.ref, Allocation]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if (formula := products().get(getattr(func, "_overloadpacket", None))) is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and self._entry(t) is None and not _is_view(t, args):
                self._add(t, self._kind(func, args, t))
        return result

    def own(self, t: Tensor, kind: str) -> None:
        """Say what a tensor is for."""
        entry = self._entry(t)
        if entry is None:
            self._add(t, kind)
        else:
            entry.kind = kind

    def keep(self) -> None:
        """What is alive now and has no name yet is kept for the backward."""
        for _, entry in self._alive.values():
            if entry.kind == TEMPORARIES:
                entry.kind = ACTIVATIONS

    def peak(self, start: int, stop: int) -> tuple[int, dict[str, int]]:
        """(bytes, bytes of each kind) at the largest moment from after operation `start` to operation `stop`."""
        changes: Counter[int] = Counter()
        for s in self.storages:
            first, last = max(s.birth, start), self.operations if s.death is None else s.death
            if first <= min(last, stop):
                changes[first] += s.size
                changes[last + 1] -= s.size
        live, best, moment = 0, -1, start
        for t in sorted(changes):
            live += changes[t]
            if t <= stop and live > best:
                best, moment = live, t
        return max(best, 0), self.at(moment)

    def at(self, moment: int) -> dict[str, int]:
        """Bytes of each kind that are alive after an operation."""
        kinds = dict.fromkeys(TERMS, 0)
        for s in self.storages:
            if s.birth <= moment and (s.death is None or s.death >= moment):
                kinds[s.kind] += s.size
        return kinds

    def _entry(self, t: Tensor) -> Allocation | None:
        held = self._alive.get(t.untyped_storage()._cdata)
        return held[1] if held else None

    def _add(self, t: Tensor, kind: str) -> None:
        storage = t.untyped_storage()
        key, entry = storage._cdata, Allocation(kind, int(storage.nbytes()), self.operations)
        self.storages.append(entry)

        def freed(_) -> None:
            entry.death = self.operations
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, freed), entry

    def _kind(self, func, args, t: Tensor) -> str:
        if (
            t.dim() > max(0, self.dim)
            and t.shape[self.dim] == self.vocabulary
            and t.numel() >= max(self.least, self.vocabulary + 1)
        ):
            return LOGITS
        if func is torch.ops.aten._to_copy.default and (source := self._entry(args[0])) and source.kind in (WEIGHTS, ADAPTERS):
            return CASTS
        return TEMPORARIES


@cache
def products() -> dict:
    """Operation → its floating-point operations, as PyTorch counts them; on a CPU attention has a name of its own."""
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten

    def forward(query, key, value, *args, out_val=None, **kwargs) -> int:
        return sdpa_flop_count(query.shape, key.shape, value.shape)

    def backward(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
        return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)

    in_place = {aten.addmm_: flop_registry[aten.addmm], aten.baddbmm_: flop_registry[aten.baddbmm]}
    own = in_place | {aten._scaled_dot_product_flash_attention_for_cpu: forward}
    return own | {aten._scaled_dot_product_flash_attention_for_cpu_backward: backward} | flop_registry


def _is_view(t: Tensor, args) -> bool:
    """Does it share the memory of an argument, which then comes from outside?"""
    key = t.untyped_storage()._cdata
    return any(isinstance(a, Tensor) and a.untyped_storage()._cdata == key for a in tree_leaves(args))
