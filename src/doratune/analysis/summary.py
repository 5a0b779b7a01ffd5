"""One analysis of several runs: points.json, the figures, and a line for each run.

points.json: {run: {"line", "points", "unchanged": [names], "spectra": {layer: {"values", "norm", "effective_rank"}},
"gradients": {"base" | "end": {layer: share}}, "problem"}}; a run that could not be measured at all has nothing but its "problem".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..errors import UserError, near_misses
from ..support.files import write_json
from ..support.folders import new_folder
from . import figures
from .measure import SPECTRA, Measured, Wanted, measure, one_line
from .points import Line, regression
from .runs import names


@dataclass(frozen=True)
class Analysis:
    """What was measured of each run and its regression line, by the run's folder; what went wrong with the others."""

    measured: dict[str, Measured]
    lines: dict[str, Line | None]
    problems: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        return {run: self._run(run) for run in self.measured} | {run: {"problem": p} for run, p in self.problems.items()}

    def _run(self, run: str) -> dict:
        measurement, line = self.measured[run], self.lines[run]
        facts = {
            "line": None if line is None else dataclasses.asdict(line),
            "points": [dataclasses.asdict(p) for p in measurement.points],
            "unchanged": measurement.unchanged,
            "spectra": {name: dataclasses.asdict(spectrum) for name, spectrum in measurement.spectra.items()},
        }
        facts |= {"gradients": measurement.gradients} if measurement.gradients else {}
        return facts | ({"problem": "; ".join(measurement.problems)} if measurement.problems else {})

    def table(self) -> str:
        """A line for each run, and one for each checkpoint or run that could not be measured."""
        said = [(run, _line_of(measurement, self.lines[run]), measurement.problems) for run, measurement in self.measured.items()]
        lines = [f"{run}: {line}" for run, words, problems in said for line in (words, *map("left out: {}".format, problems))]
        return "\n".join([*lines, *(f"{run}: not measured: {problem}" for run, problem in self.problems.items())])


def _line_of(measurement: Measured, line: Line | None) -> str:
    last = measurement.last
    changed, turned, relative = (_mean(getattr(p, key) for p in last) for key in ("magnitude", "direction", "relative"))
    words = f"{len(measurement.points)} points; at the end ΔM {changed:.3g}, ΔD {turned:.3g}, |Δm|/m {relative:.3g}"
    if measurement.spectra:
        words += f", effective rank {_mean(s.effective_rank for s in measurement.spectra.values()):.3g}"
    if shares := {when: _mean(shares.values()) for when, shares in measurement.gradients.items() if shares}:
        told = ", ".join(f"{100 * shares[when]:.3g} % at the {when}" for when in ("base", "end") if when in shares)
        words += f"; magnitude's share of the gradient {told}"
    if measurement.unchanged:
        words += f"; {len(measurement.unchanged)} weights that the run left as they were are not counted"
    if line is None:
        return f"{words}; correlation of ΔD and ΔM none (too little spread)"
    interval = "" if line.interval is None else " [{:+.2f}, {:+.2f}]".format(*line.interval)
    return f"{words}; correlation of ΔD and ΔM {line.correlation:+.2f}{interval} (slope {line.slope:+.3g})"


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def analyze(
    base: nn.Module,
    runs: Sequence[str],
    modules: tuple[str, ...],
    axis: str,
    output: Path,
    format: str = "png",
    overwrite: bool = False,
    spectrum: str = "all",
    batch: Mapping | None = None,
    check_base: bool = True,
) -> Analysis:
    """Measure the runs against their base model and write `output`, whole or not at all.

    Args:
        spectrum, batch, check_base: see `measure.Wanted`.

    Raises:
        UserError: none of the runs could be measured; an output folder that exists; an unknown spectrum.
    """
    if spectrum not in SPECTRA:
        raise UserError(f"spectrum is {spectrum!r}; expected one of {', '.join(SPECTRA)}{near_misses(spectrum, SPECTRA)}")
    wanted = Wanted(modules, axis, spectrum, batch, check_base)
    measured: dict[str, Measured] = {}
    problems: dict[str, str] = {}
    with new_folder(output, overwrite, key="points.json") as folder:
        for run in runs:
            try:
                measured[run] = measure(base, run, wanted)
            except UserError as error:
                problems[run] = one_line(error, 500)
        if not measured:
            raise UserError("; ".join(dict.fromkeys(problems.values())))
        result = Analysis(measured, {run: _line(measurement) for run, measurement in measured.items()}, problems)
        write_json(folder / "points.json", result.to_dict())
        _draw(result, folder, format)
    return result


def _line(measurement: Measured) -> Line | None:
    try:
        return regression(measurement.points)
    except UserError:
        return None


def _draw(result: Analysis, folder: Path, format: str) -> None:
    titles = [name.replace("$", r"\$") for name in names(list(result.measured))]  # matplotlib reads formulas between two of them
    short = dict(zip(result.measured, titles, strict=True))
    points = {short[run]: measurement.points for run, measurement in result.measured.items()}
    figures.scatter({short[run]: (points[short[run]], result.lines[run]) for run in short}, folder / f"scatter.{format}")
    figures.curves(points, folder / f"layers.{format}")
    spectra = {short[run]: measurement.spectra for run, measurement in result.measured.items()}
    spectra = {name: layers for name, layers in spectra.items() if any(s.values for s in layers.values())}
    if spectra:
        figures.spectra(spectra, folder / f"spectrum.{format}")
