"""The points (ΔD, ΔM) and spectra of the page: from a folder of `doratune analyze`, or measured now on adapters and models.

Cost of measuring: one base model in memory at a time, one pass over the chosen weights for each checkpoint. Spectra of adapters
only: those of dense weights can take minutes, and come from `doratune analyze`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..analysis.measure import Wanted, measure
from ..analysis.points import layer_number, module_name
from ..analysis.runs import last_result
from ..checkpoint.adapter import base_model_of
from ..checkpoint.base_model import load_base
from ..errors import UserError
from ..support.files import read_json
from .read import Run, Warn, number

KEYS = {"layer": int, "step": int, "magnitude": float, "direction": float}
MORE = ("relative", "effective_rank", "gradient_share")
"""What older analyses lack, or only the last checkpoint has."""

SHOWN = 128
"""Singular values of one weight that the page draws."""


@dataclass(frozen=True)
class PagePoints:
    """What the page draws: points, and [{run, name, module, layer, values: σ/|W|}] of the last checkpoints."""

    points: list[dict] = field(default_factory=list)
    spectra: list[dict] = field(default_factory=list)

    def add(self, run: Run, rows: list[dict], spectra: dict) -> None:
        self.points.extend(_of_run(run, rows))
        self.spectra.extend(drawn for name, value in spectra.items() if (drawn := _spectrum(run, str(name), value)) is not None)

    def ordered(self, runs: Sequence[Run]) -> PagePoints:
        order = {run.name: place for place, run in enumerate(runs)}
        return PagePoints(*(sorted(rows, key=lambda row: order[row["run"]]) for rows in (self.points, self.spectra)))


def measured(runs: Sequence[Run], modules: tuple[str, ...], warn: Warn, say: Callable[[str], None]) -> PagePoints:
    """The points of all runs that hold an adapter or a model; a run that cannot be measured is a warning."""
    by_base: dict[str, list[Run]] = {}
    for run in runs:
        if any(run.folder.glob("checkpoint-*")) or any((run.folder / name).is_dir() for name in ("adapter", "model")):
            try:
                by_base.setdefault(_base_of(run), []).append(run)
            except UserError as error:
                warn(f"{run.name}: {error}")
    drawing = PagePoints()
    for name, some in by_base.items():
        say(f"measuring ΔM and ΔD of {', '.join(run.name for run in some)} against {name}")
        try:
            base = load_base(name, last_result([run.folder for run in some]))
        except UserError as error:
            warn(f"no points of {', '.join(run.name for run in some)}: {error}")
            continue
        for run in some:
            try:
                axis = "input" if run.recipe.get("magnitude_axis") == "input" else "output"
                result = measure(base, run.folder, Wanted(modules, axis, "adapters"))
                spectra = {name: dataclasses.asdict(spectrum) for name, spectrum in result.spectra.items()}
                drawing.add(run, [dataclasses.asdict(point) for point in result.points], spectra)
                for problem in result.problems:
                    warn(f"{run.name}: {problem}")
            except UserError as error:
                warn(f"{run.name}: {error}")
    return drawing.ordered(runs)


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


def from_analysis(runs: Sequence[Run], analysis: dict, warn: Warn) -> PagePoints:
    """What was measured before, {run: {"points": […], "spectra": {…}, "problem"}}; a run is named by its path, else by its name."""
    drawing, unknown = PagePoints(), []
    for key, value in analysis.items():
        same = [run for run in runs if Path(key).resolve() == run.folder.resolve()]
        same = same or [run for run in runs if Path(key).name == run.name.split("/")[-1]]
        if len(same) != 1 or not isinstance(value, dict) or not {"points", "problem"} & set(value):
            unknown.append(key)
            continue
        if value.get("problem"):
            warn(f"{same[0].name}: {value['problem']}")
        rows, spectra = (v if isinstance(v := value.get(k), kind) else kind() for k, kind in (("points", list), ("spectra", dict)))
        points = [row for row in rows if isinstance(row, dict) and all(number(row.get(name)) is not None for name in KEYS)]
        drawing.add(same[0], points, spectra)
        if len(points) < len(rows):
            warn(f"{same[0].name}: {len(rows) - len(points)} of its {len(rows)} points are no points; analyze the run again")
    if unknown:
        warn(f"the analysis holds {', '.join(unknown)}, which is none of the runs; its points are left out")
    return drawing.ordered(runs)


def _of_run(run: Run, rows: list[dict]) -> list[dict]:
    """What the page draws: six digits are more than a screen shows, and keep the file small."""
    return [
        {"run": run.name, "name": str(row.get("name", "")), "module": str(row.get("module", ""))}
        | {key: _short(row[key]) if kind is float else int(row[key]) for key, kind in KEYS.items()}
        | {key: None if (value := number(row.get(key))) is None else _short(value) for key in MORE}
        for row in rows
    ]


def _spectrum(run: Run, name: str, value) -> dict | None:
    """One weight's line: σ/|W|; None where there is none to draw."""
    norm, values = (value.get("norm"), value.get("values")) if isinstance(value, dict) else (None, None)
    if not isinstance(values, list | tuple) or not number(norm):
        return None
    known = [v for v in map(number, values[:SHOWN]) if v]
    heights = [_short(v / norm) for v in known if v > 1e-6 * max(known)]  # the rest is rounding
    place = {"module": module_name(name), "layer": layer_number(name)}
    return {"run": run.name, "name": name} | place | {"values": heights} if heights else None


def _short(value: float) -> float:
    return float(f"{value:.6g}")
