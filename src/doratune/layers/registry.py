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
LIGHT_TOKENS = 64
"""From so many tokens on, also calls without gradients look at every bit."""

SAMPLED_TOKENS = 64
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
        self.suspicion: list[Tensor] = []  # on the device: was a frozen weight edited, unseen?
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

    def enter(self, light: bool) -> None:
        """A forward of the model begins: look at everything, and prepare what is old of what was asked last time."""
        here = self.here
        here.depth += 1
        if here.depth > 1:
            return
        here.looked = NOT_YET
        self._look_to(None, light)
        old = [one for one in self.weights() if one.asked and one.factors is not None and one.factors.key[0] != self.generation]
        for low in {one.factors.key[1][0] for one in old}:
            self._prepare([one for one in old if one.factors.key[1][0] == low], low)

    def leave(self) -> None:
        """It ends, also by an exception."""
        self.here.depth = max(0, self.here.depth - 1)

    def current(self, weight, light: bool) -> int:
        """The generation that factors must be of, after a look where one is due."""
        here = self.here
        if here.depth:
            if self.steps != _steps or here.looked < (LIGHT if light else FULL):
                self._look_to(None, light)
        elif (task := torch._C._current_graph_task_id()) < 0 or not self._known(None, light):
            self._look_to(weight, light)
        elif here.task != task:
            here.task = task
            self._look_to(None, light)
        return self.generation

    def _look_to(self, weight, light: bool) -> None:
        if self.steps != _steps:
            self.steps = _steps
            self.generation += 1
        self.look(weight, light)
        if weight is None:
            self.here.looked = LIGHT if light else FULL

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
            of_W = fingerprint([t for one in weights if (t := one.sample()) is not None])
            prints = [(True, fingerprint(parameters, light=True))] + ([] if light else [(False, fingerprint(parameters))])
            known, before = self._known(about, light), self.prints.get((about, light))
            if known and not same(before[1], together(prints[-1][1], of_W)):
                if not same(before[2], of_W):
                    self._changed(weights)
                self.generation += 1
            elif not known and any(one.factors is not None and one.factors.key[0] == self.generation for one in weights):
                self._changed(weights)  # nothing tells whether they are as they were
                self.generation += 1
            elif not known and before is not None and before[2].keys() == of_W.keys():
                self.suspicion = [(before[2][device] != of_W[device]).any() for device in of_W]  # read with what is prepared next
        for level, now in prints:
            self.prints[about, level] = self.generation, together(now, of_W), of_W

    @staticmethod
    def _changed(weights: list) -> None:
        for weight in weights:
            weight.changed()

    def _known(self, about, light: bool) -> bool:
        return self.prints.get((about, light), (None,))[0] == self.generation

    def prepare(self, weight, low: torch.dtype) -> Factors:
        """The factors of this weight in the compute dtype `low`; within a forward of the model, or its recomputation, also of the
        others that were asked since their last preparation and are old."""
        batch = [weight]
        if self.here.depth or torch._C._current_graph_task_id() >= 0:
            for other in self.weights():
                f = other.factors
                if other is not weight and other.asked and f is not None and f.key[0] != self.generation and f.key[1][0] == low:
                    batch.append(other)
        self._prepare(batch, low)
        weight.asked = True
        return weight.factors

    def _prepare(self, weights: list, low: torch.dtype) -> None:
        with unseen_by_selective_checkpoints(), torch.inference_mode(False), torch.no_grad(), no_autocast(weights[0].device):
            suspicion, self.suspicion = self.suspicion, []
            if prepared.prepare(weights, low, suspicion):  # a frozen weight was edited
                self._changed(self.weights())
                prepared.prepare(weights, low)
            for one in weights:
                one.factors.key = self.generation, one.key(low)
                # what was read is held, so that its address stays its own
                one.factors.held = [t.detach() for t in one.watched()], one.base.held(one.layer) if one.magnitude else None
                one.preparations += 1
                one.asked = False

    def size_of(self, f: Factors, out: Tensor) -> Size:
        """How far the bias stands above the rest of an output (T, O) or (N, O, S), row by row: of the first call with these factors,
        so once per optimizer step."""
        if f.size is None:
            f.size = Size(drowning(f.bias, out))
            self.sizes.add(f.size)
        return f.size

    def care(self, size: Size, care: Tensor | None) -> Tensor | None:
        """`care` and the rows that their bias drowns in a call. The sizes of all calls since the last read are read at once."""
        if size.largest is None:
            device = size.ratio_O.device
            pending = [size, *(other for other in list(self.sizes) if other is not size and other.ratio_O.device == device)]
            largest = torch.stack([other.ratio_O.amax() for other in pending]).tolist()
            for other, value in zip(pending, largest, strict=True):
                other.largest = value
            self.sizes.clear()
        if not size.largest > DROWNS:
            return care
        rows = (size.ratio_O > DROWNS).nonzero().squeeze(1)
        return rows if care is None else torch.cat([rows, care]).unique()


class Size:
    """|bias| over the rest of one output, row by row; its largest value once somebody asked."""

    __slots__ = ("__weakref__", "largest", "ratio_O")

    def __init__(self, ratio_O: Tensor):
        self.ratio_O, self.largest = ratio_O, None


def drowning(bias_O: Tensor, out: Tensor) -> Tensor:
    """|bias| / |out − bias| (O,), from some tokens of an output that holds the bias. Of the quieter tokens: a loud one may have no
    gradient. So: how large the rest of a token is over all rows, a low quantile of that, times each row's share."""
    out_TO = out if out.dim() == 2 else out.movedim(1, -1).reshape(-1, out.shape[1])
    some_SO = out_TO[:: max(1, len(out_TO) // SAMPLED_TOKENS)].to(bias_O.dtype)
    rest_SO = some_SO.sub(bias_O).square_()
    token_S1 = rest_SO.mean(1, keepdim=True)
    quiet = token_S1.masked_fill(token_S1 == 0, torch.inf).kthvalue(1 + len(token_S1) // 10, 0).values
    quiet = quiet.masked_fill_(quiet == torch.inf, 0.0)
    share_O = (rest_SO / token_S1.clamp_min(1e-30)).mean(0)
    return bias_O.abs() / (share_O * quiet).clamp_min_(1e-30).sqrt_()


def unseen_by_selective_checkpoints():
    """A selective checkpoint replays products by their order; those of a norm run in the forward and not in the recomputation."""
    if torch._C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

        if any(type(mode).__module__ == "torch.utils.checkpoint" for mode in _get_current_dispatch_mode_stack()):
            return _disable_current_modes()
    return contextlib.nullcontext()


def wrapped(t: Tensor) -> bool:
    """Is it a tensor of a function transform (vmap, grad), whose numbers cannot be looked at?"""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)


def fingerprint(tensors: list[Tensor], light: bool = False) -> dict[torch.device, Tensor]:
    """Integers (K,) on each device, equal while every bit (light: of up to 64 numbers of each tensor) is."""
    groups: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        if light and t.numel() > LIGHT_NUMBERS and t.is_contiguous():
            t = t.as_strided((LIGHT_NUMBERS,), (t.numel() // LIGHT_NUMBERS,), t.storage_offset())
        groups.setdefault((t.device, t.dtype), []).append(t)
    hashes: dict[torch.device, list[Tensor]] = {}
    for (device, _), group in groups.items():
        hashes.setdefault(device, []).extend(_hash(flat) for flat in _chunks(group))
    return {device: torch.stack(parts) for device, parts in hashes.items()}


def together(a: dict[torch.device, Tensor], b: dict[torch.device, Tensor]) -> dict[torch.device, Tensor]:
    """Two fingerprints as one."""
    return {device: torch.cat([p[device] for p in (a, b) if device in p]) for device in a | b}


def same(a: dict[torch.device, Tensor], b: dict[torch.device, Tensor]) -> bool:
    """Are two fingerprints equal? Reads each device once."""
    return a.keys() == b.keys() and all(torch.equal(a[device], b[device]) for device in a)


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


class Begin:
    """The hook at the beginning of a model's forward."""

    def __init__(self, registry: Registry):
        self.registry = registry

    def __call__(self, module, args, kwargs) -> None:
        if not torch.compiler.is_compiling():
            self.registry.enter(not torch.is_grad_enabled() and few_tokens((*args, *kwargs.values())))


class End(Begin):
    """The hook at its end."""

    def __call__(self, *_) -> None:
        if not torch.compiler.is_compiling():
            self.registry.leave()


def few_tokens(inputs: tuple) -> bool:
    """Are there fewer than 64 tokens in some input of a model? Of floating point, the last dimension has features."""
    tensors = [t for t in inputs if isinstance(t, Tensor) and not t.is_nested]
    sizes = [t.numel() // max(1, t.shape[-1]) if t.is_floating_point() and t.dim() > 1 else t.numel() for t in tensors]
    return bool(sizes) and min(sizes) < LIGHT_TOKENS


@lru_cache(maxsize=32)
def _multipliers(size: int, device: torch.device) -> Tensor:
    """Fixed random odd integers, only ever read."""
    with torch.inference_mode(False):
        info, generator = torch.iinfo(torch.int64), torch.Generator().manual_seed(1)
        return (torch.randint(info.min, info.max, (size,), dtype=torch.int64, generator=generator) | 1).to(device)
