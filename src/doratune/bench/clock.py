"""Arms interleaved step by step in one process, and ratios pair by pair: what a shared, noisy machine allows to compare.

Every round runs each arm once, in an order that turns by one from round to round; a ratio is formed within each round.
Wall time, and the process's CPU time, which other work on the machine disturbs less and which means something with one thread
only; on a GPU the device is synchronized around each arm.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

CLOCKS = ("cpu_s", "wall_s")
OUT_OF_MEMORY = "out of memory"
FAILED = object()
"""In the place of an arm or a result: it ran out of memory."""


@dataclass
class Series:
    """Seconds of one arm, round by round."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    failed: str | None = None
    """Why the arm has no figures: out of memory is a result, not a crash."""


def interleave(
    arms: dict[str, Callable[[], object]],
    rounds: int,
    warm_up: int,
    device: torch.device,
    advance: Callable[[int], object] = lambda n: None,
) -> dict[str, Series]:
    """Run each arm `warm_up` + `rounds` times in turn; the warm-up is not kept. An arm that runs out of memory, or is FAILED
    already, is left out from then on; any other error is raised."""
    names = list(arms)
    series = {name: Series(failed=OUT_OF_MEMORY if arms[name] is FAILED else None) for name in names}
    with quick_collection():
        for number in range(warm_up + rounds):
            turn = number % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                one = series[name]
                if one.failed is None:
                    seconds = attempt(lambda name=name: _timed(arms[name], device), device)
                    if seconds is FAILED:
                        series[name] = Series(failed=OUT_OF_MEMORY)
                    elif number >= warm_up:
                        one.wall_s.append(seconds[0])
                        one.cpu_s.append(seconds[1])
                advance(1)
    return series


@contextlib.contextmanager
def thread_count(threads: int):
    """Inside the block PyTorch computes with `threads` threads; 0: with as many as before.

    CPU time means something with one thread only: threads that wait for others spin, and their time is counted too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quick_collection():
    """What exists now is left out of garbage collections, which would walk over all modules before and within each step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _timed(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    gc.collect()
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def attempt(run: Callable[[], object], device: torch.device):
    """What `run` returns, or FAILED where it runs out of memory."""
    try:
        return run()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    release(device)  # here the traceback, and with it what the step held, is gone
    return FAILED


def prepare(names: Iterable[str], make: Callable[[str], object], device: torch.device) -> dict[str, object]:
    """make(name) of each arm, or FAILED."""
    return {name: attempt(lambda name=name: make(name), device) for name in names}


def out_of_memory(error: BaseException) -> bool:
    """CUDA raises OutOfMemoryError, the CPU allocator a RuntimeError in words of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def quantiles(values: list[float]) -> dict[str, float] | None:
    """p20, p50, p80 by linear interpolation; None of nothing."""
    if not values:
        return None
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"p20": p20, "p50": p50, "p80": p80}


def summary(series: dict[str, Series], wanted: dict[str, tuple]) -> dict:
    """{"arms": quantiles of each clock in seconds, or why there are none; "ratios": those of `wanted` that can be formed}."""
    arms = {
        name: {"failed": one.failed} if one.failed else {clock: quantiles(getattr(one, clock)) for clock in CLOCKS}
        for name, one in series.items()
    }
    return {"arms": arms, "ratios": {k: r for k, names in wanted.items() if (r := ratios(series, *names)) is not None}}


def ratios(series: dict[str, Series], over: str, under: str, minus: str | None = None) -> dict | None:
    """Quantiles of (over − minus) / (under − minus) by clock, round by round; None where an arm is absent or failed."""
    wanted = [over, under] + ([minus] if minus else [])
    if any(name not in series or series[name].failed for name in wanted):
        return None
    result = {}
    for clock in CLOCKS:
        a, b = getattr(series[over], clock), getattr(series[under], clock)
        floor = getattr(series[minus], clock) if minus else [0.0] * len(a)
        result[clock] = quantiles([(x - z) / (y - z) for x, y, z in zip(a, b, floor, strict=True) if y != z])
    return result
