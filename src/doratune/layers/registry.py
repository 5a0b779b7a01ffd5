"""The adapted weights of one attachment, and when their factors are old.

    generation   bumped by a step of any torch optimizer (plain, foreach, fused, compiled), and by the net
    the net      a fingerprint of all parameters (`fingerprint.py`), taken once per forward of the model, where its root is called;
                 what is old is then prepared for all weights together. A layer that is called outside of the model's forward looks
                 at its own parameters; a recomputation in a backward pass looks once per pass. The host reads once each time, and
                 in no other layer
    key          addresses and versions of A, B, m, bias and W, the compute dtype (`AdaptedWeight.stamps`)
    changed()    loads, moves, dtype changes, merges, `doratune.refresh`

What only `doratune.refresh(model)` covers: a `.data` edit of a part of a frozen weight, and, before a call of fewer than 64 tokens
without gradients, of single numbers of A, B or m.
"""

from __future__ import annotations

import contextlib
import threading
import weakref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..math.autograd import no_autocast
from ..math.dora import Factors
from . import fsdp, prepared, shares
from .fingerprint import Watched, same, tensor_in, together

DROWNS = 4.0
"""From this ratio of a bias to the rest of an output on, y has lost the rest's digits."""

LIGHT_TOKENS = 64
"""From so many tokens on, also calls without gradients look at every bit."""

SAMPLED_TOKENS = 64
NOT_YET, LIGHT, FULL = 0, 1, 2
_CPU, _CUDA = torch.device("cpu"), torch.device("cuda")

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
        self.members = weakref.WeakValueDictionary()  # in the order in which they came, by id
        self.generation = self.prepared = 0  # prepared: the one of the last forward of the model
        self.steps = _steps
        self.prints: dict[tuple, tuple] = {}
        self.watched: dict[int | None, Watched] = {}
        self.suspicion: list[Tensor] = []  # on the device: was a frozen weight edited, unseen?
        self.search = shares.Search()
        self.sizes = weakref.WeakSet()
        self.here = _Here()
        self.lock = threading.RLock()  # a look, and what is prepared after it, is one thread's at a time

    def __deepcopy__(self, memo):
        return Registry()

    def __reduce__(self):
        return Registry, ()

    def add(self, weight) -> None:
        with self.lock:
            self.members.pop(id(weight), None)
            self.members[id(weight)] = weight
            self.watched.clear()
            self.search.begin()

    def weights(self) -> list:
        """Those whose layers are there."""
        return [weight for weight, _ in self.present()]

    def present(self) -> list[tuple]:
        """(weight, its layer) of those whose layers are there. A layer of a `mixed` block goes when its thread leaves the block,
        but not while somebody has this list."""
        pairs = [(weight, weight.layer) for weight in self.members.values()]
        return [(weight, layer) for weight, layer in pairs if layer is not None and vars(layer).get("adapted") is weight]

    def find_shares(self, model, running: bool = False) -> None:
        """Find out which weights are whole only while they run; running: in a forward. Else parameters are put in their places."""
        if not running:
            fsdp.reshard(model)
        if new := self.search.new(self.weights, running):
            shares.find(new, model, running)
            self.search.end(new, running)
            self.watched.clear()
            self.generation += 1

    def enter(self, light: bool, model=None) -> None:
        """A forward of the model begins: look at everything, and prepare what is old of what was asked last time."""
        here = self.here
        here.depth += 1
        if here.depth > 1:
            return
        if model is not None:
            with self.lock:
                self.find_shares(model, running=True)
        here.looked = NOT_YET
        with self.lock:
            self._look_to(None, light)
            self._prepare_old()

    def _prepare_old(self) -> None:
        if self.prepared == self.generation:
            return
        self.prepared, present = self.generation, self.present()
        old = [one for one, _ in present if one.asked and one.factors is not None and one.factors.generation != self.generation]
        old = [one for one in old if not one.shares or one.at_hand()]
        for low in {one.factors.low for one in old}:
            self._prepare([one for one in old if one.factors.low == low], low)

    def leave(self) -> None:
        """It ends, also by an exception."""
        self.here.depth = max(0, self.here.depth - 1)

    def current(self, weight, light: bool) -> int:
        """The generation that factors must be of, after a look where one is due."""
        here = self.here
        if here.depth and self.steps == _steps and here.looked >= (LIGHT if light else FULL):
            return self.generation
        with self.lock:
            if here.depth:
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
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        about = None if weight is None else id(weight)
        if not self._known(about, light):  # what is known of more, or of more closely, tells whether it is as it was
            if light and self._known(about, False):
                self.look(weight, False)
            elif weight is not None and (self._known(None, light) or self._known(None, False)):
                self.look(None, light)
        if about not in self.watched:
            present = self.present() if weight is None else [(weight, weight.layer)]
            self.watched[about] = Watched([one for one, _ in present])
        with unseen_by_selective_checkpoints(), torch.inference_mode(False), torch.no_grad(), no_autocast(_CPU), no_autocast(_CUDA):
            watched = self.watched[about]
            if not watched.look():
                self.generation += 1
                return
            of_W = watched.print_of_W()
            now = together(watched.print(light), of_W)
            self._compare(weight, light, now, of_W)
        self.prints[about, light] = self.generation, now, of_W

    def _compare(self, weight, light: bool, now, of_W) -> None:
        about = None if weight is None else id(weight)
        _, before, W_before = self.prints.get((about, light), (None, None, None))
        if self._known(about, light) and same(before, now):
            return
        weights = self.weights() if weight is None else [weight]
        if self._known(about, light):
            if not same(W_before, of_W):
                self._changed(weights)
            self.generation += 1
        elif any(one.factors is not None and one.factors.generation == self.generation for one in weights):
            if not (self._known(about, False) or self._known(None, light) or self._known(None, False)):
                self._changed(weights)  # nothing tells whether they are as they were
                self.generation += 1
        elif W_before is not None and W_before.keys() == of_W.keys():
            self.suspicion += [(W_before[device] != of_W[device]).any() for device in of_W]  # read with what is prepared next

    @staticmethod
    def _changed(weights: list) -> None:
        for weight in weights:
            weight.changed()

    def _known(self, about, light: bool) -> bool:
        return self.prints.get((about, light), (None,))[0] == self.generation

    def prepare(self, weight, low: torch.dtype) -> Factors:
        """The factors of this weight in the compute dtype `low`; within a forward of the model, or its recomputation, also of the
        others that were asked since their last preparation and are old."""
        with self.lock:
            batch, present = [weight], self.present()
            if self.here.depth or torch._C._current_graph_task_id() >= 0:
                for other, _ in present:
                    f = other.factors
                    if other is not weight and other.asked and f is not None and f.generation != self.generation and f.low == low:
                        batch += [other] if not other.shares or other.at_hand() else []
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
                f = one.factors
                f.generation, f.low, f.stamps, f.storage = self.generation, low, one.stamps(), one.storage()
                # what was read is held, so that its address stays its own
                own = [tensor_in(slot) for slot in one.slots()] if one.shares else one.watched()
                f.held = [t.detach() for t in own if t is not None], one.held() if one.magnitude else None
                one.preparations += 1
                one.asked = False

    def size_of(self, f: Factors, out: Tensor) -> Size:
        """How far the bias stands above the rest of an output (T, O) or (N, O, S), row by row: of the first call with these
        factors, so once per optimizer step."""
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
