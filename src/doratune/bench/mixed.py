"""Decode of a batch in which each row has an adapter of its own, against a batch of one adapter.

    one       8 rows, all through one DoRA adapter that is in use
    mixed     8 rows, each through another of 8 adapters (`doratune.mixed`), all loaded on the same model
    alone     the same 8 rows one after the other, each through its adapter: what a server without mixed batches does
    frozen    8 rows of the base

The block of `mixed` is entered, and its adapters prepared, before anything is timed, as a server does.
"""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

import doratune

from ..support.models import contiguous_head
from ..support.progress import Progress, silent
from .arms import attach_arm, move, share
from .clock import interleave, summary
from .decode import PROMPT, decode
from .settings import BenchSettings
from .shapes import random_ids

ADAPTERS = 8
RATIOS = {"mixed/one": ("mixed", "one"), "mixed/alone": ("mixed", "alone"), "one/frozen": ("one", "frozen")}


def measure(base: nn.Module, settings: BenchSettings, label: str, progress: Progress = silent) -> dict:
    """{rank: {"arms": seconds of a whole decode of 8 rows, "ratios"}}."""
    return {str(rank): _one_rank(base, rank, settings, f"mixed {label} rank {rank}", progress) for rank in settings.ranks}


def _one_rank(base: nn.Module, rank: int, settings: BenchSettings, label: str, progress) -> dict:
    prompts, names = random_ids(base, ADAPTERS, PROMPT), [f"n{i}" for i in range(ADAPTERS)]
    model, one = adapted(base, rank, settings.targets, names), adapted(base, rank, settings.targets, names[:1])
    new, rounds = settings.new_tokens, settings.few_rounds

    def alone():
        for i, name in enumerate(names):
            way.choose([name])
            decode(model, prompts[i : i + 1], new)

    def mixed():
        way.choose(names)
        decode(model, prompts, new)

    arms = {"one": lambda: decode(one, prompts, new), "mixed": mixed, "alone": alone, "frozen": lambda: decode(base, prompts, new)}
    with ExitStack() as stack, progress(label, (settings.warm_up + rounds) * len(arms)) as advance:
        for each in (model, one, base):
            stack.enter_context(contiguous_head(each))
        way = stack.enter_context(doratune.mixed(model, names))
        return summary(interleave(arms, rounds, settings.warm_up, prompts.device, advance), RATIOS)


def adapted(base: nn.Module, rank: int, targets: list[str], names: list[str]) -> nn.Module:
    """A model over the weights of `base` with these DoRA adapters, away from their start; the last one is in use."""
    model = share(base)
    for name in names:
        attach_arm("dora", model, targets, rank, name)
        move(model)
    return model.eval()
