"""The points (ΔD, ΔM) of the page: from a folder of `doratune analyze`, or measured now on the runs' adapters and models.

Cost of measuring: one base model in memory at a time, one pass over the chosen weights for each checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ..analysis.points import points_of
from ..checkpoint.adapter import base_model_of
from ..checkpoint.files import read_json
from ..errors import UserError
from ..models import load_model
from .read import Run, Warn, number

KEYS = {"layer": int, "step": int, "magnitude": float, "direction": float}


def measured(runs: Sequence[Run], modules: tuple[str, ...], warn: Warn, say: Callable[[str], None]) -> list[dict]:
    """The points of all runs that hold an adapter or a model; a run that cannot be measured is a warning."""
    by_base: dict[str, list[Run]] = {}
    for run in runs:
        if any(run.folder.glob("checkpoint-*")) or any((run.folder / name).is_dir() for name in ("adapter", "model")):
            try:
                by_base.setdefault(_base_of(run), []).append(run)
            except UserError as error:
                warn(f"{run.name}: {error}")
    found = []
    for name, some in by_base.items():
        say(f"measuring ΔM and ΔD of {', '.join(run.name for run in some)} against {name}")
        try:
            base = load_model(name, "float32")
        except UserError as error:
            warn(f"no points of {', '.join(run.name for run in some)}: {error}")
            continue
        for run in some:
            try:
                points = points_of(base, run.folder, modules, run.recipe.get("magnitude_axis", "output"))
                found += _of_run(run, [dataclasses.asdict(point) for point in points])
            except UserError as error:
                warn(f"{run.name}: {error}")
    return _in_order(found, runs)


def _base_of(run: Run) -> str:
    """The model that the recipe names; without a recipe, the one that the adapter records."""
    name = run.recipe.get("model")
    return name if isinstance(name, str) and name else base_model_of(run.folder / "adapter")


def read_points(folder: Path) -> dict:
    """points.json of `doratune analyze`.

    Raises:
        UserError: there is none, or it is no JSON.
    """
    return read_json(folder / "points.json", "give --analysis auto, none, or the folder that doratune analyze wrote")


def given(runs: Sequence[Run], analysis: dict, warn: Warn) -> list[dict]:
    """Points that were measured before, {run: {"points": […]}}; a run is found by its path, else by its name."""
    found, unknown = [], []
    for key, value in analysis.items():
        same = [run for run in runs if Path(key).resolve() == run.folder.resolve()]
        same = same or [run for run in runs if Path(key).name == run.name.split("/")[-1]]
        rows = value.get("points") if isinstance(value, dict) else None
        if len(same) == 1 and isinstance(rows, list):
            kept = [row for row in rows if isinstance(row, dict) and all(number(row.get(name)) is not None for name in KEYS)]
            found += _of_run(same[0], kept)
            if len(kept) < len(rows):
                warn(f"{same[0].name}: {len(rows) - len(kept)} of its {len(rows)} points are no points; analyze the run again")
        else:
            unknown.append(key)
    if unknown:
        warn(f"the analysis holds {', '.join(unknown)}, which is none of the runs; its points are left out")
    return _in_order(found, runs)


def _in_order(points: list[dict], runs: Sequence[Run]) -> list[dict]:
    order = [run.name for run in runs]
    return sorted(points, key=lambda point: order.index(point["run"]))


def _of_run(run: Run, rows: list[dict]) -> list[dict]:
    """What the page draws: four digits are more than a screen shows, and keep the file small."""
    return [
        {"run": run.name, "name": str(row.get("name", "")), "module": str(row.get("module", ""))}
        | {key: kind(f"{row[key]:.6g}") if kind is float else int(row[key]) for key, kind in KEYS.items()}
        for row in rows
    ]
