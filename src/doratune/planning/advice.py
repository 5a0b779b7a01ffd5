"""What follows from a plan: the largest batch or rank that fits, and the cheapest change where it does not fit.

Changes in the order of what they cost a user: smaller batches that are accumulated (the same training), checkpointing (a third more
time), both, a base in 4 bits (other numbers), all of it, shorter examples (other data). The first that fits is the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from ..config import METHODS
from .plan import MemoryPlan, Planner
from .settings import PlanSettings
from .workloads import Workload

MOST = 1_000_000


def largest_that_fits(planner: Planner, settings: PlanSettings, plan: MemoryPlan) -> int:
    """The largest `settings.largest` that fits, 0 where not even 1 does; a rank is at most the layers' smallest side."""
    name = settings.largest
    if name == "rank" and settings.method not in METHODS:
        return 0
    value = getattr(settings, name)
    limit = largest_rank(planner, settings) if name == "rank" else MOST

    def total(value: int) -> int:
        return plan.total if value == getattr(settings, name) else planner.of(dataclasses.replace(settings, **{name: value})).total

    fitting = largest(total, planner.capacity, min(value, limit), limit)
    return fitting - fitting % settings.processes if name == "batch_size" else fitting


def largest(total, capacity: int, near: int, limit: int) -> int:
    """The largest whole number of at most `limit` whose `total`, which grows with it, is within the capacity; 0: none.

    near: where to begin. The line through the two values next to the capacity gives the next one to try; a value fits for good
    where one more would not, by that line."""
    known: dict[int, int] = {}
    low, high, guess = 0, limit + 1, near
    while high - low > 1:
        known[guess] = total(guess)
        low, high = (guess, high) if known[guess] <= capacity else (low, guess)
        if len(known) == 1:
            guess = 2 * guess if low else guess // 2
        else:
            one, other = sorted(known, key=lambda value: abs(known[value] - capacity))[:2]
            slope = max((known[other] - known[one]) / (other - one), 1)
            if low in known and known[low] + slope > capacity:
                return low
            guess = int(one + (capacity - known[one]) / slope)
        guess = min(max(guess, low + 1), high - 1)
    return low


def largest_rank(planner: Planner, settings: PlanSettings) -> int:
    """The smallest side of the layers that the settings adapt."""
    from .architecture import architecture_of

    built = architecture_of(dataclasses.replace(settings, rank=1, rank_overrides={}), planner.config)
    return min(min(spec["shape"]) for spec in built.adapters.values())


def cheapest_change(planner: Planner) -> str | None:
    """The first change after which the run fits, in words, with its total; None where none does."""
    fit = first_fit(planner)
    return None if fit is None else f"{fit[0]}: {fit[1].total / 2**30:.2f} GiB"


def first_fit(planner: Planner, allowed: Callable[[PlanSettings], bool] = lambda settings: True) -> tuple[str, MemoryPlan] | None:
    """(the change in words, its plan) of the cheapest change after which the run fits; the first is none at all.

    Args:
        allowed: which of the changed settings are tried.
    """
    for words, settings in changes(planner.settings, planner.workload):
        if not allowed(settings):
            continue
        plan = planner.of(settings)
        if plan.fits is not False:
            return words, plan
        if (part := _split(planner, settings)) is not None:
            also = "" if settings is planner.settings else f"{words} "
            split = f"--batch_size {part.settings.batch_size} --gradient_accumulation {part.settings.gradient_accumulation}"
            return also + split, part
    return None


def changes(settings: PlanSettings, workload: Workload) -> Iterator[tuple[str, PlanSettings]]:
    """(flags, settings), the cheapest first; each is also tried with smaller batches."""
    yield "as it is", settings
    checkpointed, flags = settings, ""
    if settings.checkpointing == "none" and workload.can_checkpoint:
        checkpointed, flags = dataclasses.replace(settings, checkpointing="non-reentrant"), " --checkpointing non-reentrant"
        yield flags.strip(), checkpointed
    if settings.method in METHODS and settings.quantize == "none" and workload.can_quantize:
        yield "--quantize nf4", dataclasses.replace(settings, quantize="nf4")
        if flags:
            yield f"--quantize nf4{flags}", dataclasses.replace(checkpointed, quantize="nf4")
    if settings.method == "full":
        yield f"--method dora{flags}", dataclasses.replace(checkpointed, method="dora")
    shorter = settings.max_length // 2
    if shorter > workload.least_length:
        yield f"--max_length {shorter}{flags}", dataclasses.replace(checkpointed, max_length=shorter)


def _split(planner: Planner, settings: PlanSettings) -> MemoryPlan | None:
    """The plan of the largest part of the batch that fits, with as many examples a step; None where not even one example does."""
    whole = settings.batch_size * settings.gradient_accumulation
    least = settings.processes
    parts = [n for n in range(settings.batch_size // 2, 0, -1) if settings.batch_size % n == 0 and n % least == 0]

    def at(batch: int) -> MemoryPlan:
        return planner.of(dataclasses.replace(settings, batch_size=batch, gradient_accumulation=whole // batch))

    if not parts or at(parts[-1]).total > planner.capacity:
        return None
    return next(plan for n in parts if (plan := at(n)).total <= planner.capacity)
