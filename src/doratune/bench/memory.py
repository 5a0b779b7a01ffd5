"""Bytes kept for the backward pass after one forward of the training step's loss. Deterministic: counted, not sampled.

    saved_bytes    what the graph's saved tensors hold: unique storages, without the model's parameters and buffers
    packed_bytes   all that was handed to autograd's saved-tensor hooks during the forward, also what was dropped again before
                   its end (PEFT packs a dense B·A for its norm and then detaches it): the usual way to count, kept beside
    live_bytes     what the forward made and is still alive after it: also sees what contexts, closures and caches hold

Each is counted in a forward after a whole step, so that what is made once (optimizer state, facts of W) is there already,
and the norm, which every optimizer step makes stale, is not. On a GPU also the peak of one step.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..support.progress import Progress, silent
from .arms import build
from .clock import FAILED, OUT_OF_MEMORY, attempt, release
from .settings import BenchSettings
from .shapes import random_ids
from .train_step import TrainStep

RATIOS = {"dora/lora": ("dora", "lora"), "dora/dora_peft": ("dora", "dora_peft")}
SCENARIOS = {"plain": False, "checkpointing": True}


class LiveStorages(TorchDispatchMode):
    """Counts the storages that operations inside the block make; weak references, so that it keeps nothing alive."""

    def __init__(self, track_peak: bool = False):
        super().__init__()
        self.track_peak = track_peak
        self.peak = 0
        self._before: dict[int, StorageWeakRef] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for _, ref in _storages((args, kwargs)):
            if ref.cdata not in self._made:  # no operation here made it
                self._before.setdefault(ref.cdata, ref)
        result = func(*args, **(kwargs or {}))
        for storage, ref in _storages(result):
            if ref.cdata not in self._before:
                self._made.setdefault(ref.cdata, (ref, storage.nbytes()))
        if self.track_peak:
            self.peak = max(self.peak, self.live())
        return result

    def live(self) -> int:
        """Bytes of what was made and is alive now."""
        self._made = {key: (ref, size) for key, (ref, size) in self._made.items() if not ref.expired()}
        return sum(size for _, size in self._made.values())


def _storages(tree) -> list:
    """(storage, weak reference) of every tensor; a weak reference also keeps the address `cdata` from being used again."""
    held = (t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor))
    return [(storage, StorageWeakRef(storage)) for storage in held]


def live_bytes(forward: Callable[[], object]) -> int:
    """Bytes that `forward` made and that are alive while its result is."""
    with LiveStorages() as storages:
        result = forward()
    gc.collect()
    size = storages.live()
    del result
    return size


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes alive after any operation of `run` that `run` made; what a single operation needs inside is not seen."""
    with LiveStorages(track_peak=True) as storages:
        run()
    return storages.peak


class _Saved:
    """One saved tensor's storage; dies with the graph that holds it."""

    def __init__(self, t: Tensor):
        self.storage = t.untyped_storage()


def saved_bytes(forward: Callable[[], object], model: nn.Module, dropped_too: bool = False) -> int:
    """Bytes that the graph of `forward`'s result holds, without the model's parameters and buffers. It has no backward.

    dropped_too: also what was packed and dropped again during the forward."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    everything = weakref.WeakSet()
    holding: list[_Saved] = []

    def pack(t: Tensor) -> _Saved:
        saved = _Saved(t)
        everything.add(saved)
        if dropped_too:
            holding.append(saved)
        return saved

    with saved_tensors_hooks(pack, lambda _: None):
        result = forward()
    gc.collect()
    kept = {saved.storage.data_ptr(): saved.storage.nbytes() for saved in everything}
    del result
    return sum(size for address, size in kept.items() if address not in own)


def measure(base: nn.Module, settings: BenchSettings, label: str, progress: Progress = silent) -> dict:
    """{rank: {scenario: {"arms": bytes, "ratios"}}}; one arm is built at a time."""
    ids = random_ids(base, settings.batch_size, settings.length)
    result = {}
    for rank in settings.ranks:
        with progress(f"memory {label} rank {rank}", len(SCENARIOS) * len(settings.arms)) as advance:
            result[str(rank)] = {
                scenario: _scenario(base, ids, rank, settings, checkpointing, advance)
                for scenario, checkpointing in SCENARIOS.items()
            }
    return result


def _scenario(base, ids: Tensor, rank: int, settings: BenchSettings, checkpointing: bool, advance) -> dict:
    arms = {}
    for name in settings.arms:
        kept = attempt(lambda name=name: _kept(name, base, ids, rank, settings, checkpointing), ids.device)
        arms[name] = {"failed": OUT_OF_MEMORY} if kept is FAILED else kept
        release(ids.device)
        advance(1)
    return {"arms": arms, "ratios": _ratios(arms)}


def _kept(name: str, base, ids: Tensor, rank: int, settings: BenchSettings, checkpointing: bool) -> dict[str, int]:
    model = build(name, base, settings.targets, rank)
    step = TrainStep(model, ids, checkpointing=checkpointing)
    step()
    counts = {"live_bytes": live_bytes(step.loss)}
    step()
    counts["saved_bytes"] = saved_bytes(step.loss, model)
    step()
    counts["packed_bytes"] = saved_bytes(step.loss, model, dropped_too=True)
    if ids.is_cuda:
        release(ids.device)
        before = torch.cuda.memory_allocated(ids.device)
        torch.cuda.reset_peak_memory_stats(ids.device)
        step()
        peak = torch.cuda.max_memory_allocated(ids.device)
        counts |= {"step_peak_bytes": peak, "step_extra_bytes": peak - before}
    return counts


def _ratios(arms: dict[str, dict]) -> dict:
    usable = {name: counts for name, counts in arms.items() if "failed" not in counts}
    return {
        label: {key: size / usable[under][key] for key, size in usable[over].items() if usable[under][key]}
        for label, (over, under) in RATIOS.items()
        if over in usable and under in usable
    }
