"""All measurements of a BenchSettings: the model is loaded once a dtype, each result is written as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import doratune

from ..adapter.targets import select
from ..errors import UserError
from . import decode, layer, memory, norm, record, sizes, train_step
from .clock import release, silent
from .settings import BenchSettings
from .shapes import load

OF_A_MODEL = {"train_step": train_step.measure, "decode": decode.measure, "memory": memory.measure}
OF_A_LAYER = {"norm": norm.measure, "layer": layer.measure, "sizes": sizes.measure}


def run_all(settings: BenchSettings, say: Callable[[str], None] = print, progress=silent) -> dict:
    """{measurement: {dtype: {rank: …}}}; also written to `settings.output`.

    Args:
        say: takes a line about each file that was written.
        progress: makes a bar, (label, total) -> (advance, close).

    Raises:
        UserError: see `BenchSettings.check`; a model that is missing, does not fit, or lacks the targets.
    """
    settings.check()
    folder, facts, results = Path(settings.output), record.facts(settings), {}
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file; give --output the name of a folder")

    def done(what: str, result: dict) -> None:
        results.setdefault(what, {}).update(result)
        say(f"{what}: {record.write(folder, what, facts, results[what])}")

    for dtype in settings.dtypes if set(settings.what) & OF_A_MODEL.keys() else []:
        base = load(settings.model, dtype, settings.torch_device(), settings.quantize)
        select(base, doratune.AdapterConfig(targets=settings.targets))
        for what, measure in OF_A_MODEL.items():
            if what in settings.what:
                done(what, {dtype: measure(base, settings, dtype, progress)})
        del base
        release(settings.torch_device())
    for what, measure in OF_A_LAYER.items():
        if what in settings.what:
            done(what, measure(settings, progress))
    return results


def ratio_lines(results: dict, clock: str) -> list[str]:
    """A line for each ratio: measurement, dtype, rank, scenario or size, name, and the median with p20 and p80."""
    lines = []

    def walk(node, path: tuple[str, ...]) -> None:
        if not isinstance(node, dict):
            return
        for name, value in node.get("ratios", {}).items():
            lines.append(f"{' '.join(path):<58} {name:<34} {_shown(value, clock)}")
        for key, child in node.items():
            if key not in ("arms", "ratios", "errors"):
                walk(child, (*path, key))

    walk(results, ())
    return lines


def _shown(value: dict, clock: str) -> str:
    if clock not in value:
        return ", ".join(f"{key} {number:.3f}" for key, number in value.items())
    times = value[clock]
    return f"{times['p50']:.3f} ({times['p20']:.3f} to {times['p80']:.3f})" if times else "-"
