"""The norm, computed once per change of A and B: not once per forward, per checkpoint recomputation or per decoded token.

Version counters alone are unsound: fused AdamW, `.data` writes and custom ops change a parameter without bumping
`_version`. The key therefore has four parts:

    step token     a counter bumped after every step of any torch optimizer (plain, foreach, fused, compiled)
    identity       `data_ptr`, `_version`, dtype and device of A and B, the version of W, the compute dtype
    epoch          bumped by loads, moves, dtype changes, merges and `doratune.refresh`
    fingerprint    an integer hash of all bits of A and B, as the net: on CPU in every call with gradients enabled or of 64
                   tokens or more; on CUDA once per model forward for all layers together (one sync), and only while
                   gradients are enabled

What only `doratune.refresh(model)` covers: a `.data` write by hand followed by a call without gradients, on CPU of fewer
than 64 tokens.

Cost of the fingerprint: one read of A and B (well under 1 % of a training step).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

HASH_FROM_TOKENS = 64

_optimizer_steps = 0


def _count_step(*_):
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class NormCache:
    """One layer's norm. Copies of a model start with an empty cache: they neither share nor pollute it."""

    def __init__(self):
        self.clear()
        self.evaluations = 0
        """How often the norm was really computed."""

    def clear(self) -> None:
        self._entry: _Entry | None = None

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return type(self), ()

    def get(
        self,
        sources: tuple[Tensor, ...],
        context: tuple,
        tokens: int,
        compute: Callable[[], Tensor],
        gradients: bool = False,
    ) -> Tensor:
        """The value for these sources, from `compute` when anything changed.

        sources: the parameters that the value depends on; context: hashable facts that it depends on besides;
        tokens, gradients: size of this call and whether gradients are enabled (inside an autograd function
        `torch.is_grad_enabled()` does not tell), which decide whether the full hash is worth it.
        """
        with _unseen_by_selective_checkpoints():
            return self._get(sources, context, tokens, compute, gradients)

    def _get(self, sources, context: tuple, tokens: int, compute: Callable[[], Tensor], gradients: bool):
        key = self._key(sources, context)
        entry = self._entry
        same = entry is not None and entry.key == key
        current = self._fingerprint(sources, tokens, gradients, entry.bits if same else None)
        if same and (current is None or current == entry.fingerprint):
            return entry.value
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        self.evaluations += 1
        self._store(key, sources, value, current)
        return value

    def stale(self, context: tuple) -> bool:
        """Was there a value of this context, which an optimizer step has made old?"""
        return self._entry is not None and self._entry.key[0] != _optimizer_steps and self._entry.key[1] == context

    def put(self, sources: tuple[Tensor, ...], context: tuple, value: Tensor) -> None:
        """Keep a value that was computed for these sources ahead of their call."""
        self.evaluations += 1
        self._store(self._key(sources, context), sources, value, None)

    def _key(self, sources, context: tuple) -> tuple:
        return (_optimizer_steps, context, *(identity(t) for t in sources))

    def _store(self, key: tuple, sources, value, fingerprint) -> None:
        # Holding the sources keeps their memory from being given to other tensors: an address is then an identity.
        held, bits = tuple(t.detach() for t in sources), ()
        if _cheap_hash(sources):
            old = self._entry
            same_memory = old is not None and [t[::2] for t in old.key[2:]] == [t[::2] for t in key[2:]]
            bits = old.bits if same_memory else tuple(bit_pattern(t) for t in held)
            fingerprint = fingerprint or hash_bits(held, bits)
        self._entry = _Entry(key, fingerprint, value, held, bits)

    def _fingerprint(self, sources, tokens: int, gradients: bool, bits):
        if _cheap_hash(sources):
            return hash_bits(sources, bits) if tokens >= HASH_FROM_TOKENS or gradients or sources[0].is_inference() else None
        if sources and sources[0].is_cuda and gradients:
            return None if torch.cuda.is_current_stream_capturing() else _rounds.fingerprint(self, sources)
        return None


def _unseen_by_selective_checkpoints():
    """A selective checkpoint replays products by their order; those of a norm run in the forward and not in the recomputation."""
    if torch._C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

        if any(type(mode).__module__ == "torch.utils.checkpoint" for mode in _get_current_dispatch_mode_stack()):
            return _disable_current_modes()
    return contextlib.nullcontext()


class _Entry(NamedTuple):
    """Stored at once: threads may share a layer."""

    key: tuple
    fingerprint: tuple[int, ...] | None
    value: object
    sources: tuple[Tensor, ...]
    bits: tuple  # bit patterns over the sources' memory, with their multipliers


def identity(t: Tensor) -> tuple:
    """Every second part says where the memory is and what it holds; the others what may change in place."""
    return t.data_ptr(), 0 if t.is_inference() else t._version, (t.dtype, t.device, t.shape, t.stride())


def _cheap_hash(sources) -> bool:
    return bool(sources) and sources[0].device.type == "cpu"


def hash_bits(sources: tuple[Tensor, ...], bits: tuple | None = None) -> tuple[int, ...]:
    """An integer hash of every bit: dot product with fixed odd multipliers modulo 2**32 or 2**64, so position counts.

    bits: the sources' `bit_pattern`s, where they are known."""
    return tuple(_hash(*(bits[i] if bits and bits[i] else bit_pattern(t, copy=True))).item() for i, t in enumerate(sources))


def bit_pattern(t: Tensor, copy: bool = False) -> tuple[Tensor, Tensor] | None:
    """(t's memory as integers (K,), multipliers (K,)); None, unless `copy`, where that cannot be a view."""
    if not copy and not (t.is_contiguous() and t.element_size() >= 4):
        return None
    flat = t.detach().contiguous().view(-1)
    if flat.element_size() < 4:
        flat = flat.float()
    size = flat.element_size()
    whole = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    pattern = flat.view(torch.int64 if whole else torch.int32)
    return pattern, _multipliers(pattern)


def _hash(bits: Tensor, multipliers: Tensor) -> Tensor:
    """The top bit alone would vanish where an even number of signs flip, so the upper half is mixed into the lower one first."""
    bits = bits ^ (bits >> (4 * bits.element_size()))
    return torch.dot(bits, multipliers) if bits.device.type == "cpu" else (bits * multipliers).sum()


_multiplier_cache: dict[tuple, Tensor] = {}


def _multipliers(bits: Tensor) -> Tensor:
    """Fixed random odd integers, grown as needed, one set per dtype and device."""
    key = bits.dtype, bits.device
    have = _multiplier_cache.get(key)
    if have is None or len(have) < len(bits):
        with torch.inference_mode(False):
            info = torch.iinfo(bits.dtype)
            generator = torch.Generator().manual_seed(1)
            size = max(2 * len(bits), 2**16)
            have = torch.randint(info.min, info.max, (size,), dtype=bits.dtype, generator=generator) | 1
            have = _multiplier_cache[key] = have.to(bits.device)
    return have[: len(bits)]


class _Rounds:
    """CUDA: one fingerprint of all layers per model forward. A round ends when a layer is asked a second time."""

    def __init__(self):
        self.members = weakref.WeakKeyDictionary()  # cache -> weak references to its sources
        self.prints = {}  # id of a cache -> its hash in this round
        self.seen = set()

    def fingerprint(self, cache: NormCache, sources: tuple[Tensor, ...]) -> tuple[int, ...]:
        known = [ref() for ref in self.members.get(cache, ())]
        same = len(known) == len(sources) and all(a is b for a, b in zip(known, sources, strict=True))
        self.members[cache] = tuple(weakref.ref(t) for t in sources)
        if id(cache) in self.seen:
            self._begin(sources[0].device)
        if not same or id(cache) not in self.prints:  # new, or not asked in the last round: alone
            self.prints[id(cache)] = hash_bits(sources)
        self.seen.add(id(cache))
        return self.prints[id(cache)]

    def _begin(self, device) -> None:
        """Hash every layer that the last round asked, with one transfer to the host."""
        live = [(cache, [ref() for ref in refs]) for cache, refs in list(self.members.items())]
        live = [(c, ts) for c, ts in live if id(c) in self.seen and all(t is not None and t.device == device for t in ts)]
        values = iter(torch.stack([_hash(*bit_pattern(t, copy=True)).long() for _, ts in live for t in ts]).tolist())
        self.prints = {id(cache): tuple(next(values) for _ in ts) for cache, ts in live}
        self.seen = set()


_rounds = _Rounds()
