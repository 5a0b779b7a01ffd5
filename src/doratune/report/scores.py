"""Score tables: accuracy with its 95 % interval, against the base model, the most frequent answer and chance.

Wilson's interval of a share p of n items: (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n), with z = 1.96.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..evaluation.summary import own_shares
from .read import Run, Scores, number
from .tables import Table, TableCell, percent

Z = 1.959963984540054
"""97.5 % of the normal distribution."""

UNPARSABLE = 0.05
"""More outputs without an answer than this are worth a warning."""


def wilson(right: float, total: float) -> tuple[float, float]:
    """The 95 % interval of a share; it never leaves 0 to 1 and is not empty at either end."""
    p, z2 = right / total, Z * Z
    middle, half = p + z2 / (2 * total), Z * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    low, high = ((middle + sign * half) / (1 + z2 / total) for sign in (-1, 1))
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding at p = 0 and 1


def score_tables(runs: Sequence[Run]) -> list[Table]:
    """One table a protocol for runs that were scored on the same tasks."""
    runs = [run for run in runs if run.after.results]
    results = [result for run in runs for result in run.after.results]
    return [_table(runs, protocol) for protocol in dict.fromkeys(r["protocol"] for r in results)]


def _table(runs: Sequence[Run], protocol: str) -> Table:
    known = {r["task"]: r for run in runs for r in run.after.results if r["protocol"] == protocol}
    average = any(a["protocol"] == protocol for run in runs for a in run.after.averages)
    lines = [*_bases(runs), *((run.name, run.after) for run in runs)]
    rows = [[name, *_cells(scores, protocol, known, average)] for name, scores in lines]
    for key, name in (("majority", "most frequent answer"), ("chance", "chance")):
        shares = [number(result.get(key)) for result in known.values()]
        mean = [None if None in shares else sum(shares) / len(shares)] if average else []
        rows.append([name, *(percent(share) for share in [*shares, *mean])])
    note = "Beside each accuracy its 95 % interval (Wilson, over the items of one run: seeds are not in it); the tick is chance."
    if average:
        note += " Average: over tasks, ± 1.96 standard errors."
    return Table(f"Accuracy, {protocol}", ["", *known, *(["average"] if average else [])], rows, note)


def _bases(runs: Sequence[Run]) -> list[tuple[str, Scores]]:
    """The base model's scores, once where all runs agree on them."""
    bases: dict[tuple, tuple[list[str], Scores]] = {}
    tasks = set(runs[0].after.tasks()) if runs else set()
    for run in runs:
        if run.before.results and set(run.before.tasks()) >= tasks:
            key = tuple(sorted((r["task"], r["protocol"], r["right"]) for r in run.before.results))
            bases.setdefault(key, ([], run.before))[0].append(run.name)
    if len(bases) == 1:
        return [("base model", scores) for _, scores in bases.values()]
    return [(f"base model of {', '.join(names)}", scores) for names, scores in bases.values()]


def _cells(scores: Scores, protocol: str, tasks: dict, average: bool) -> list[TableCell | None]:
    own = {r["task"]: r for r in scores.results if r["protocol"] == protocol}
    cells = [_cell(own[task]) if task in own else None for task in tasks]
    if average:
        mean = next((a for a in scores.averages if a["protocol"] == protocol), None)
        cells.append(_mean_cell(mean) if mean else None)
    return cells


def _cell(result: dict) -> TableCell:
    right, total = result["right"], result["total"]
    low, high = wilson(right, total)
    below = [f"{right:,} of {total:,}"]
    if (share := number(result.get("unparsable"))) is not None and (share or result["protocol"] == "generate"):
        below.append(f"{percent(share)} unparsable")
    published = result.get("published")
    if isinstance(published, list) and published and isinstance(published[0], dict) and number(published[0].get("accuracy")):
        below.append(f"published {percent(published[0]['accuracy'])}")
    below += own_shares(result)
    interval = (low, right / total, high)
    return TableCell(percent(right / total), _between(low, high), " · ".join(below), interval, number(result.get("chance")))


def _mean_cell(mean: dict) -> TableCell | None:
    accuracy, error = number(mean.get("accuracy")), number(mean.get("standard_error"))
    if accuracy is None:
        return None
    if error is None:
        return TableCell(percent(accuracy))
    low, high = max(0.0, accuracy - Z * error), min(1.0, accuracy + Z * error)
    return TableCell(percent(accuracy), _between(low, high), "", (low, accuracy, high), number(mean.get("chance")))


def _between(low: float, high: float) -> str:
    return f"{100 * low:.1f} – {100 * high:.1f}"


def unparsable(runs: Sequence[Run]) -> list[str]:
    """A line for each task on which too many outputs of a trained model hold no answer."""
    return [
        f"{run.name}: {percent(share)} of its outputs on {r['task']} ({r['protocol']}) hold no answer and count as wrong"
        for run in runs
        for r in run.after.results
        if (share := number(r.get("unparsable"))) is not None and share > UNPARSABLE
    ]
