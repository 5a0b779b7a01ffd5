"""One analysis of several runs: points.json, the figures, and a line for each run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..checkpoint.files import new_folder, write_json
from ..errors import UserError
from . import figures
from .points import Line, Point, points_of, regression


@dataclass(frozen=True)
class Analysis:
    """Points and regression line of each run, by its folder's name."""

    points: dict[str, list[Point]]
    lines: dict[str, Line | None]

    def to_dict(self) -> dict:
        return {
            run: {
                "line": None if self.lines[run] is None else dataclasses.asdict(self.lines[run]),
                "points": [dataclasses.asdict(p) for p in points],
            }
            for run, points in self.points.items()
        }

    def table(self) -> str:
        lines = []
        for run, points in self.points.items():
            last = [p for p in points if p.step == max(q.step for q in points)]
            means = (sum(getattr(p, key) for p in last) / len(last) for key in ("magnitude", "direction"))
            line = self.lines[run]
            shown = "none (too little spread)" if line is None else f"{line.correlation:+.2f} (slope {line.slope:+.3g})"
            mean_m, mean_d = means
            lines.append(
                f"{run}: {len(points)} points; at the end ΔM {mean_m:.3g}, ΔD {mean_d:.3g}; correlation of ΔD and ΔM {shown}"
            )
        return "\n".join(lines)


def analyze(
    base: nn.Module,
    runs: list[str],
    modules: tuple[str, ...],
    axis: str,
    output: Path,
    format: str = "png",
    overwrite: bool = False,
) -> Analysis:
    """Measure the runs against their base model and write `output`, whole or not at all.

    Raises:
        UserError: see `points.points_of`; an output folder that exists.
    """
    with new_folder(output, overwrite) as folder:
        points = {run: points_of(base, run, modules, axis) for run in runs}
        lines: dict[str, Line | None] = {}
        for run, some in points.items():
            try:
                lines[run] = regression(some)
            except UserError:
                lines[run] = None
        result = Analysis(points, lines)
        write_json(folder / "points.json", result.to_dict())
        short = {run: Path(run).name for run in runs}
        figures.scatter({short[run]: (points[run], lines[run]) for run in runs}, folder / f"scatter.{format}")
        figures.curves({short[run]: points[run] for run in runs}, folder / f"layers.{format}")
    return result
