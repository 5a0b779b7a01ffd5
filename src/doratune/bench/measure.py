"""All measurements of a BenchSettings: the model is loaded once a dtype, each result is written as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import doratune

from ..errors import UserError
from ..support.folders import refuse_no_folder
from ..support.outputs import refuse_inputs
from ..support.progress import Progress, silent
from . import decode, host, layer, memory, mixed, norm, record, sizes, train_step
from .allocator import hold_still
from .arms import pattern, share
from .clock import release, thread_count
from .settings import BenchSettings
from .shapes import load
from .tables import way_of

OF_A_MODEL = {"train_step": train_step.measure, "decode": decode.measure, "mixed": mixed.measure, "memory": memory.measure}
OF_A_LAYER = {"norm": norm.measure, "layer": layer.measure, "sizes": sizes.measure, "host": host.measure}
COUNTED = ("memory",)
"""The same with any number of threads."""


def run_all(settings: BenchSettings, say: Callable[[str], None] = print, progress: Progress = silent) -> dict:
    """{measurement: {dtype: {rank: …}}}; also written to `settings.output`. With one thread it is `<measurement>_1_thread`.

    Args:
        say: takes a line about each file that was written.
        progress: as `support.progress`.

    Raises:
        UserError: see `BenchSettings.check`; a model that is missing, does not fit, or lacks the targets.
    """
    settings.check()
    hold_still()
    folder, facts, results = Path(settings.output), record.facts(settings), {}
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file; give --output the name of a folder")
    refuse_no_folder(folder)
    refuse_inputs(folder, {"the model": settings.model})

    def done(what: str, result: dict, variant: str = "", threads: int = 0) -> None:
        key = record.with_threads(what, threads)
        results.setdefault(key, {}).update(result)
        here = facts | {"threads": 1 if what == "host" else threads or torch.get_num_threads()}
        say(f"{key}: {record.write(folder, what, here, results[key], variant, threads)}")

    for dtype in settings.dtypes if set(settings.what) & OF_A_MODEL.keys() else []:
        base = load(settings.model, dtype, settings.torch_device(), settings.quantize)
        check_targets(base, settings.targets)
        for what, threads in timings(settings):
            with thread_count(threads):
                result = OF_A_MODEL[what](base, settings, record.with_threads(dtype, threads), progress)
            done(what, {dtype: result}, record.variant(settings), threads)
        del base
        release(settings.torch_device())
    for what, measure in OF_A_LAYER.items():
        if what in settings.what:
            done(what, measure(settings, progress))
    return results


def timings(settings: BenchSettings) -> list[tuple[str, int]]:
    """(measurement of a model, threads) that are asked for; what is counted is measured once."""
    asked = [what for what in OF_A_MODEL if what in settings.what]
    return [(what, threads) for what in asked for threads in ([0] if what in COUNTED else dict.fromkeys(settings.threads))]


def check_targets(base: torch.nn.Module, targets: list[str]) -> None:
    """Raises UserError where a name selects nothing, before anything is measured."""
    doratune.attach(share(base), doratune.AdapterConfig(method="lora", rank=1, targets=pattern(targets)))


def ratio_lines(results: dict) -> list[str]:
    """A line for each ratio: measurement, dtype, rank, scenario or size, name, and the median with p20 and p80 by the clock that
    its number of threads allows."""
    lines = []

    def walk(node, path: tuple[str, ...]) -> None:
        if not isinstance(node, dict):
            return
        for name, value in node.get("ratios", {}).items():
            lines.append(f"{' '.join(path):<58} {name:<34} {_shown(value, way_of(path[0]).clock)}")
        for key, child in node.items():
            if key not in ("arms", "ratios", "errors", "operations"):
                walk(child, (*path, key))

    walk(results, ())
    return lines


def _shown(value: dict, clock: str) -> str:
    if clock not in value:
        return ", ".join(f"{key} {number:.3f}" for key, number in value.items())
    times = value[clock]
    return f"{times['p50']:.3f} ({times['p20']:.3f} to {times['p80']:.3f})" if times else "-"
