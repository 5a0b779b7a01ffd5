"""Runs → one HTML file. Tables and samples are written by a template that escapes everything; the charts' data is JSON in a script
tag without any `<`; plotly.js (4.8 MB) stands in the file. The page's own policy forbids it every request.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from .. import __version__
from ..analysis.runs import names
from ..errors import UserError, listed
from ..support.files import read_json, replacing
from ..support.outputs import refuse_inputs
from . import points as movement
from .overview import cost_table, runs_table, unmoved, without_direction
from .points import PagePoints
from .read import Run, Warn, expand, number, read_run
from .samples import answers_on_the_way, sample_sets
from .scores import score_tables, unparsable
from .settings import blocks, differences, groups
from .tables import Table, shown

MARK = b'<meta name="generator" content="doratune">'
"""What each page holds near its beginning, and nobody else's."""


def build(
    runs: Sequence[Path],
    output: Path,
    *,
    title: str = "",
    analysis: str = "auto",
    modules: Sequence[str] = ("q_proj", "v_proj"),
    before: Path | None = None,
    points: dict | None = None,
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """Write the page.

    Args:
        runs: folders of runs, or of comparisons, whose cells are the runs.
        analysis: "auto" measures ΔM and ΔD now (a comparison has measured already), "none" leaves them out, else a folder
            of `doratune analyze`.
        modules: last names of the weights that are measured; none: all.
        before: scores of the base model, for runs that hold none.
        points: what points.json holds, in place of `analysis`.
        tables, notes: shown in front of the scores, below the warnings.
        say: takes each line of the report.

    Returns:
        {"output", "runs", "points", "warnings", "bytes"}

    Raises:
        UserError: a path that is no run, a run named twice, an output that exists, a package that is missing.
    """
    template, plotly = _tools()
    _refuse_output(output, runs, overwrite)
    warnings: list[str] = []

    def warn(line: str) -> None:
        line = " ".join(line.split())
        if line not in warnings:
            warnings.append(line)
            say(f"warning: {line}")

    records, extra, grids = collect(runs, before, warn)
    for line in [*differences(records), *unparsable(records), *unmoved(records), *without_direction(records)]:
        warn(line)
    drawn = _points(records, runs, analysis, tuple(modules), points, warn, say)
    parts = _parts(records, drawn, grids, warn) | {"tables": [*extra, *tables], "notes": notes, "warnings": warnings}
    page = template.render(parts, title=title or _title(records), version=__version__, plotly=plotly)
    content = page.encode("utf-8", "replace")  # half a surrogate pair is valid JSON and no text
    with replacing(output) as temporary:
        temporary.write_bytes(content)
    facts = {"runs": [run.name for run in records], "points": len(drawn.points), "warnings": warnings, "bytes": len(content)}
    return {"output": str(output)} | facts


def _refuse_output(output: Path, runs: Sequence[Path], overwrite: bool) -> None:
    """Raise UserError where the page would take the place of something that is no page, or lie among what it reads."""
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the name of a file, such as {output / 'report.html'}")
    if output.exists() and not output.is_file():
        raise UserError(f"{output} is a device; give the name of a file")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists; give another name or pass --overwrite")
    if output.exists() and MARK not in output.read_bytes()[:2000]:
        raise UserError(f"{output} is no page of doratune report, so --overwrite does not replace it; give another name")
    refuse_inputs(output, {}, [cell for run in runs for cell in [run, *run.glob("cells/*")]])
    inside = any(os.path.realpath(output).startswith(os.path.realpath(run) + os.sep) for run in runs)
    if inside and output.suffix not in (".html", ".htm"):
        raise UserError(f"{output} lies in a run, where a page's name ends in .html; give {output.name}.html, or another place")


def _parts(runs: Sequence[Run], drawn: PagePoints, grids: list[dict], warn: Warn) -> dict:
    """What the template shows of the runs."""
    shared, varying = blocks(runs)
    logs = [{"name": run.name, "log": run.log} for run in runs]
    return {
        "runs": runs_table(runs),
        "groups": [(name, score_tables(some), cost_table(some)) for name, some in groups(runs).items()],
        "samples": sample_sets(runs, warn),
        "answers": [(run.name, prompts) for run in runs if (prompts := answers_on_the_way(run, warn))],
        "shared": shared,
        "varying": varying,
        "measured": bool(drawn.points),
        "grids": [grid["title"] for grid in grids],
        "data": script_json({"runs": logs, "points": drawn.points, "spectra": drawn.spectra, "grids": grids}),
    }


def _title(runs: Sequence[Run]) -> str:
    shown_names = listed((run.name for run in runs), 4)
    return f"{len(runs)} training runs: {shown_names}" if len(runs) > 1 else f"Training run {shown_names}"


def _tools():
    """(the template, plotly.js)."""
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise UserError(f"a report needs {error.name.partition('.')[0]}; pip install 'doratune[report]'") from None
    here = files("doratune.report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template, style, script = ((here / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    environment.globals |= {"style": style, "script": script}
    environment.filters["shown"] = shown
    return environment.from_string(template), get_plotlyjs()


def script_json(value) -> str:
    """JSON that can stand in a script tag: nothing in it ends the tag, opens a comment, or is no ASCII."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def collect(folders: Sequence[Path], before: Path | None, warn: Warn) -> tuple[list[Run], list[Table], list[dict]]:
    """(all runs, the tables and the curves that comparisons among the folders bring along).

    Raises:
        UserError: see `read.expand`; a run named twice.
    """
    if not folders:
        raise UserError("runs is not set; give doratune report RUN, or several")
    bases = {folder: folder / "base" if (folder / "base").is_dir() else before for folder in folders}
    pairs = [(run, bases[folder]) for folder in folders for run in expand(folder)]
    resolved = [run.resolve() for run, _ in pairs]
    if twice := sorted({str(run) for run, _ in pairs if resolved.count(run.resolve()) > 1}):
        raise UserError(f"runs names {', '.join(twice)} twice; name each run once")
    labels = names([run for run, _ in pairs])
    read = [read_run(run, label, base, warn) for (run, base), label in zip(pairs, labels)]
    summaries = [_summary(folder, warn) for folder in folders]
    tables = [Table.from_dict(table) for summary in summaries for table in _objects(summary.get("tables"))]
    return read, tables, [grid for summary in summaries for value in _objects(summary.get("curves")) if (grid := curve(value))]


def _summary(folder: Path, warn: Warn) -> dict:
    """A comparison's summary; empty where there is none."""
    if not (folder / "compare.json").is_file():
        return {}
    try:
        return read_json(folder / "compare.json", "compare the runs again")
    except UserError as error:
        warn(str(error))
        return {}


def _objects(value) -> list[dict]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def curve(value: dict) -> dict | None:
    """Score by rank or by examples, one series a method, as the chart takes it; None where no point is whole."""
    series = value.get("series") if isinstance(value.get("series"), dict) else {}
    lines = {
        str(name): [{key: number(p.get(key)) for key in ("x", "mean", "low", "high")} for p in _objects(points)]
        for name, points in series.items()
    }
    lines = {name: [p for p in points if p["x"] is not None and p["mean"] is not None] for name, points in lines.items()}
    words = {key: str(value.get(key) or "") for key in ("title", "x", "y")}
    return words | {"series": lines} if any(lines.values()) else None


def _points(runs, folders, analysis: str, modules, points: dict | None, warn: Warn, say) -> PagePoints:
    if points is not None:
        return movement.from_analysis(runs, points, warn)
    if analysis == "none":
        return PagePoints()
    if analysis != "auto":
        return movement.from_analysis(runs, movement.read_points(Path(analysis)), warn)
    done = [folder / "analysis" for folder in folders if (folder / "analysis" / "points.json").is_file()]
    if len(done) < len(folders):
        return movement.measured(runs, modules, warn, say)
    try:
        return movement.from_analysis(runs, dict(pair for folder in done for pair in movement.read_points(folder).items()), warn)
    except UserError as error:
        warn(str(error))
        return PagePoints()
