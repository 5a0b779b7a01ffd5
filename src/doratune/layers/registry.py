"""The adapted weights of one attachment, and when their factors are old.

    generation   bumped by a step of any torch optimizer (plain, foreach, fused, compiled), and by the net
    the net      a fingerprint of all parameters, taken once per forward of the model, at its first adapted layer. A layer that is
                 called outside of the model's forward looks at its own parameters; a recomputation in a backward pass looks once
                 per pass. It is read by the host once, and in no other layer
    key          addresses and versions of A, B, m, bias and W, the compute dtype (`AdaptedWeight.key`)
    changed()    loads, moves, dtype changes, merges, `doratune.refresh`

Version counters alone are unsound: fused AdamW, `.data` writes (an EMA swap) and custom ops change a parameter and bump nothing. The
fingerprint is an integer hash of every bit: a dot product with fixed odd multipliers modulo 2**64, so position counts. In calls of
few tokens without gradients it is of evenly spread numbers only, since a swap changes nearly all of them.

What only `doratune.refresh(model)` covers: a `.data` edit of a part of a frozen weight, and, before a call of fewer than 64 tokens
without gradients, of single numbers of A, B or m.

Cost: one read of the parameters in chunks that stay in the cache, 0.2 ms for 3·10⁵ numbers on one CPU core; `light`: 64 of each.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..math.autograd import no_autocast
from ..math.dora import Factors
from . import prepared

DROWNS = 4.0
"""From this ratio of a bias to the rest of an output on, y has lost the rest's digits."""

CHUNK_NUMBERS, OTHER_CHUNK = 2**18, 2**24
"""Numbers that are hashed at once on a CPU, and elsewhere."""

LIGHT_NUMBERS = 64
NOT_YET, LIGHT, FULL = 0, 1, 2

_steps = 0
"""Optimizer steps of this process: a step of any optimizer may have changed any parameter."""


def _count_step(*_):
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _Here(threading.local):
    """Where this thread is: inside a forward of the model, how far it has looked there, in which backward pass it looked last."""

    depth, looked, task = 0, NOT_YET, -1


class Registry:
    """Copies of a model have a registry of their own: they neither share nor pollute it."""

    def __init__(self):
        self.refs: list[weakref.ref] = []
        self.generation = 0
        self.steps = _steps
        self.prints: dict[tuple, tuple] = {}
        self.sizes = weakref.WeakSet()
        self.here = _Here()

    def __deepcopy__(self, memo):
        return Registry()

    def __reduce__(self):
        return Registry, ()

    def add(self, weight) -> None:
        self.refs = [weakref.ref(other) for other in self.weights() if other is not weight] + [weakref.ref(weight)]

    def weights(self) -> list:
        """Those whose layers are there."""
        weights = (ref() for ref in self.refs)
        return [weight for weight in weights if weight is not None and weight.layer is not None]

    def enter(self, *_) -> None:
        """A forward of the model begins (a hook)."""
        if not torch.compiler.is_compiling():
            self.here.depth += 1
            if self.here.depth == 1:
                self.here.looked = NOT_YET

    def leave(self, *_) -> None:
        """It ends, also by an exception (a hook)."""
        if not torch.compiler.is_compiling():
            self.here.depth = max(0, self.here.depth - 1)

    def current(self, weight, light: bool) -> int:
        """The generation that factors must be of, after a look where one is due."""
        if self.steps != _steps:
            self.steps = _steps
            self.generation += 1
        here, level = self.here, LIGHT if light else FULL
        if here.depth:
            if here.looked < level:
                here.looked = level
                self.look(None, light)
        elif (task := torch._C._current_graph_task_id()) < 0 or not self._known(None, light):
            self.look(weight, light)
        elif here.task != task:
            here.task = task
            self.look(None, light)
        return self.generation

    def look(self, weight, light: bool) -> None:
        """Fingerprint one weight, or all (None); a new generation if they are not as they were when their factors were prepared."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        about = None if weight is None else id(weight)
        if weight is not None and not self._known(about, light) and self._known(None, light):
            self.look(None, light)  # its own print is not known yet: that of all tells whether it is as it was
        weights = self.weights() if weight is None else [weight]
        with unseen_by_selective_checkpoints(), torch.inference_mode(False), torch.no_grad():
            parameters = [t.detach() for one in weights for t in one.watched()]
            if any(wrapped(t) for t in parameters):
                self.generation += 1
                return
            samples = [] if light else [t for one in weights if one.magnitude and (t := one.sample()) is not None]
            prints = [(True, fingerprint(parameters, light=True), [])]
            if not light:
                prints.append((False, fingerprint(parameters), fingerprint(samples)))
            _, now, W_now = prints[-1]
            known = self._known(about, light)
            _, before, W_before = self.prints.get((about, light), (None, [], []))
            if known and not same(W_before, W_now):
                for one in weights:
                    one.changed()
            unseen = any(one.factors is not None and one.factors.key[0] == self.generation for one in weights)
            if not same(before, now) if known else unseen:
                self.generation += 1
        for level, now, W_now in prints:
            self.prints[about, level] = self.generation, now, W_now

    def _known(self, about, light: bool) -> bool:
        return self.prints.get((about, light), (None,))[0] == self.generation

    def prepare(self, weight, low: torch.dtype) -> Factors:
        """The factors of this weight in the compute dtype `low`; within a forward of the model, or its recomputation, also of the
        others that were asked since their last preparation and are old."""
        with unseen_by_selective_checkpoints(), torch.inference_mode(False), torch.no_grad(), no_autocast(weight.device):
            batch = [weight]
            together = self.here.depth or torch._C._current_graph_task_id() >= 0
            for other in self.weights() if together else ():
                f = other.factors
                if other is not weight and other.asked and f is not None and f.key[0] != self.generation and f.key[1][0] == low:
                    batch.append(other)
            prepared.prepare(batch, low)
            for one in batch:
                one.factors.key = self.generation, one.key(low)
                # what was read is held, so that its address stays its own
                one.factors.held = [t.detach() for t in one.watched()], one.base.held(one.layer)
                one.preparations += 1
                one.asked = one is weight
        return weight.factors

    def size_of(self, x_TI: Tensor) -> Size:
        """Root mean square of some rows of x, on its device."""
        some = x_TI[:: max(1, len(x_TI) // 64)]
        size = Size(some.square().mean(dtype=torch.float32).sqrt())
        self.sizes.add(size)
        return size

    def care(self, f: Factors, size: Size, care: Tensor | None) -> Tensor | None:
        """`care` and the rows that their bias drowns, with inputs of this size. The sizes of all calls since the last read are read
        at once."""
        if size.value is None:
            device = size.tensor.device
            pending = [size, *(other for other in list(self.sizes) if other is not size and other.tensor.device == device)]
            for other, value in zip(pending, torch.stack([other.tensor for other in pending]).tolist(), strict=True):
                other.value = value
            self.sizes.clear()
        if DROWNS * size.value >= f.drowned:
            return care
        rows = (f.drowning > DROWNS * size.value).nonzero().squeeze(1)
        rows = rows if care is None else torch.cat([rows, care]).unique()
        return rows if len(rows) else None


class Size:
    """How large the inputs of one call are: on the device, and as a number once somebody asked."""

    __slots__ = ("__weakref__", "tensor", "value")

    def __init__(self, tensor: Tensor):
        self.tensor, self.value = tensor, None


def unseen_by_selective_checkpoints():
    """A selective checkpoint replays products by their order; those of a norm run in the forward and not in the recomputation."""
    if torch._C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

        if any(type(mode).__module__ == "torch.utils.checkpoint" for mode in _get_current_dispatch_mode_stack()):
            return _disable_current_modes()
    return contextlib.nullcontext()


def identity(t: Tensor) -> tuple:
    """Where a tensor's numbers are, and their version where they have one."""
    return t.data_ptr(), 0 if t.is_inference() else t._version


def wrapped(t: Tensor) -> bool:
    """Is it a tensor of a function transform (vmap, grad), whose numbers cannot be looked at?"""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)


def fingerprint(tensors: list[Tensor], light: bool = False) -> list[Tensor]:
    """Integers (K,) for each device, equal while every bit (light: of up to 64 numbers of each tensor) is."""
    groups: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        if light and t.numel() > LIGHT_NUMBERS and t.is_contiguous():
            t = t.as_strided((LIGHT_NUMBERS,), (t.numel() // LIGHT_NUMBERS,), t.storage_offset())
        groups.setdefault((t.device, t.dtype), []).append(t)
    hashes: dict[torch.device, list[Tensor]] = {}
    for (device, _), group in groups.items():
        hashes.setdefault(device, []).extend(_hash(flat) for flat in _chunks(group))
    return [torch.stack(parts) for parts in hashes.values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Are two fingerprints equal? Reads each device once."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _chunks(tensors: list[Tensor]):
    """Flat tensors of about one chunk each."""
    limit = CHUNK_NUMBERS if tensors[0].device.type == "cpu" else OTHER_CHUNK
    part, size = [], 0
    for t in tensors:
        part.append(t)
        size += t.numel()
        if size >= limit:
            yield from torch._C._nn.flatten_dense_tensors(part).split(2 * limit)
            part, size = [], 0
    if part:
        yield from torch._C._nn.flatten_dense_tensors(part).split(2 * limit)


def _hash(flat: Tensor) -> Tensor:
    """The top bit alone would vanish where an even number of signs flip, so the upper half is mixed into the lower one first."""
    if flat.element_size() < 4:
        flat = flat.float()
    if flat.numel() * flat.element_size() % 8:
        flat = torch.cat([flat, flat.new_zeros(1)])
    elif flat.storage_offset() * flat.element_size() % 8:
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
