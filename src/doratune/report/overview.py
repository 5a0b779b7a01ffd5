"""What each run is, how it ended and what it took: the page's first table, its table of costs, and what metrics.json warns of."""

from __future__ import annotations

from collections.abc import Sequence

from .read import Run, number
from .tables import NONE, Table, duration, percent, size


def runs_table(runs: Sequence[Run]) -> Table:
    """What each run is and how it ended."""
    rows = []
    for run in runs:
        environment = run.metrics.get("environment")
        date = environment.get("date") if isinstance(environment, dict) else None
        setting = [str(run.recipe[key]) if run.recipe.get(key) is not None else NONE for key in ("method", "rank", "lr", "seed")]
        losses = [run.number(key) for key in ("steps", "final_loss", "eval_loss")]
        moved = [percent(run.number("magnitude_moved"), 3), run.number("direction_moved")]
        rows.append([run.name, run.state, *setting, *losses, *moved, str(date)[:16].replace("T", " ") if date else NONE])
    heads = "run, state, method, rank, lr, seed, steps, final loss, eval loss, m moved, direction moved, date (UTC)"
    note = "m moved: mean of |Δm|/m; direction moved: mean of 1 − cos, both as training measured them."
    return Table("Runs", heads.split(", "), rows, note)


def cost_table(runs: Sequence[Run]) -> Table:
    """What each run took."""
    rows = []
    for run in runs:
        trainable, total = run.number("trainable"), run.number("total")
        share = percent(trainable / total, 3) if trainable is not None and total else NONE
        times = [duration(run.number("seconds")), duration(run.number("cpu_seconds"))]
        tokens, speed = run.number("tokens"), run.number("tokens_per_second")
        rows.append([run.name, trainable, share, size(run.number("peak_bytes")), *times, tokens, speed and round(speed)])
    units = " or ".join(dict.fromkeys(str(run.metrics.get("unit", "tokens")) for run in runs))
    heads = ["run", "trained parameters", "share", "peak memory", "time", "CPU time", units, f"{units}/s"]
    return Table("Cost", heads, rows, "Of the training alone; share: of the base model's parameters; tokens without padding.")


def unmoved(runs: Sequence[Run]) -> list[str]:
    """Runs whose magnitude did not move: DoRA that silently was not DoRA."""
    return [
        f"{run.name}: {run.metrics.get('warning') or 'the magnitude did not move'}"
        for run in runs
        if run.metrics.get("warning") or run.number("magnitude_moved") == 0
    ]


def without_direction(runs: Sequence[Run]) -> list[str]:
    """Rows without direction, where metrics.json records them: a count, or a count for each layer."""
    lines = []
    for run in runs:
        zero_rows = run.metrics.get("zero_rows")
        counts = [number(value) or 0 for value in zero_rows.values()] if isinstance(zero_rows, dict) else [number(zero_rows) or 0]
        if sum(counts):
            where = f" in {len(zero_rows)} layers" if isinstance(zero_rows, dict) else ""
            lines.append(f"{run.name}: {sum(counts):,} rows without direction{where} stay plain LoRA rows")
    return lines
