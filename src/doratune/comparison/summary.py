"""The tables of a grid: scores with intervals, cost beside them, paired differences, and plain words about who is ahead.

A row is one configuration (method, rank, size) at the learning rate of its method's sweep, over the seeds that finished. A
difference pairs the seeds and items that both configurations share; it is called shown where its p, corrected for the number of
comparisons on that score, is below α.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ..support.tables import aligned
from ..training.recipe import TrainRecipe
from .cells import Rates, folder_of, ranks_of
from .collect import Result
from .recipe import CompareRecipe
from .statistics import Difference, Estimate, holm, over_seeds, paired_bootstrap, paired_difference

NAMES = {
    "likelihood": "accuracy, likelihood",
    "generate": "accuracy, generate",
    "paper": "accuracy, paper",
    "eval_loss": "evaluation loss",
}


@dataclass(frozen=True)
class TextTable:
    """A table as text: what the terminal, Markdown and the report show."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def text(self) -> str:
        return "\n".join([self.title, *aligned(self.columns, self.rows), *([self.note] if self.note else [])])


@dataclass(frozen=True)
class ConfigurationRow:
    """One configuration's figures over its seeds; `scores` by name: likelihood, generate, eval_loss."""

    method: str
    rank: int | None
    size: int | None
    lr: float
    seeds: list[int]
    scores: dict[str, Estimate]
    trainable: int
    total: int
    peak_bytes: float | None
    seconds: float
    cpu_seconds: float | None
    tokens_per_second: float

    @property
    def name(self) -> str:
        return " ".join([self.method] + [f"r{self.rank}"] * bool(self.rank) + [f"n{self.size}"] * bool(self.size))


@dataclass(frozen=True)
class Pair:
    """Configuration a against b, on one score; `corrected` is p by Holm's method over all pairs of that score, `visible` the
    smallest difference that such a comparison finds four times in five."""

    a: str
    b: str
    score: str
    difference: Difference
    corrected: float
    visible: float
    confidence: float

    @property
    def shown(self) -> bool:
        return self.difference.shown and self.corrected < 1 - self.confidence

    @property
    def words(self) -> str:
        d = self.difference
        lower = self.score == "eval_loss"
        figure = (
            f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
            if lower
            else f"{100 * d.mean:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
        )
        if not self.shown:
            return f"{self.a} against {self.b}, {NAMES[self.score]}: no difference shown ({figure})"
        ahead, behind = (self.a, self.b) if (d.mean < 0) == lower else (self.b, self.a)
        return f"{ahead} is better than {behind} in {NAMES[self.score]}: {self.a} - {self.b} = {figure}"


@dataclass(frozen=True)
class Summary:
    """Everything that a finished grid says."""

    rows: list[ConfigurationRow]
    pairs: list[Pair]
    lrs: dict[str, float]
    notes: list[str]
    score: str
    confidence: float
    best_run: str
    """Folder of the run with the lowest evaluation loss; without a validation split, of that with the best score."""
    facts: dict = field(default_factory=dict)

    def tables(self) -> list[TextTable]:
        return [score_table(self), pair_table(self)] if self.pairs else [score_table(self)]

    def text(self) -> str:
        words = [pair.words for pair in self.pairs if pair.score == self.score]
        return "\n\n".join([*(t.text() for t in self.tables()), "\n".join(words), "\n".join(self.notes)]).strip()

    def curves(self) -> list[dict]:
        """Score against rank (Fig. 5) and against the number of examples (Fig. 4), where the grid varies them."""
        charts = []
        for axis, name in (("rank", "rank"), ("size", "training examples")):
            if len({getattr(row, axis) for row in self.rows if getattr(row, axis)}) > 1:
                series: dict[str, list[dict]] = {}
                for row in self.rows:
                    estimate, x = row.scores.get(self.score), getattr(row, axis)
                    if estimate is not None:
                        other = row.size if axis == "rank" else row.rank
                        label = row.method + (f" {'n' if axis == 'rank' else 'r'}{other}" if other else "")
                        series.setdefault(label, []).append({"x": x} | dataclasses.asdict(estimate))
                charts.append({"title": f"{NAMES[self.score]} by {name}", "x": name, "y": NAMES[self.score], "series": series})
        return charts

    def to_dict(self) -> dict:
        tables = [dataclasses.asdict(table) for table in self.tables()]
        return dataclasses.asdict(self) | {"tables": tables, "curves": self.curves()}


def summarize(grid: CompareRecipe, shared: TrainRecipe, results: list[Result], chosen: Rates, notes: list[str]) -> Summary:
    """Rows and pairs of the finished cells."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(result.cell.configuration, []).append(result)
    rows = {key: _row(key, chosen[key[:2]], group, grid.confidence) for key, group in groups.items()}
    pairs = _compared(grid, shared, groups, {key: row.name for key, row in rows.items()})
    few = sorted({row.name for row in rows.values() if len(row.seeds) < len(grid.seeds)})
    notes = notes + [f"{name}: fewer than the grid's {len(grid.seeds)} seeds finished" for name in few]
    for r in results:
        if r.cell.size and r.metrics.get("examples", r.cell.size) < r.cell.size:
            notes = [*notes, f"{r.cell.name}: the data holds {r.metrics['examples']} examples for training, not {r.cell.size}"]
    if grid.score == "eval_loss" and any(len(grid.lrs_of(method, shared)) > 1 for method in grid.methods):
        notes = [*notes, "the learning rates were chosen by the loss that is shown: a little too low, for every method alike"]
    if len(grid.seeds) < 3:
        notes = [
            *notes,
            f"{len(grid.seeds)} seed{'s' * (len(grid.seeds) > 1)}: take at least three before you believe a difference",
        ]
    facts = {
        "model": shared.model,
        "data": shared.data,
        "tasks": shared.tasks,
        "items": sum(len(v) for v in next(iter(results[0].right.values()), {}).values()),
        "environment": results[0].metrics.get("environment"),
        "unit": results[0].metrics.get("unit", "tokens"),
    }
    lrs = {f"{m} r{rank}" if rank and grid.sweep_ranks == "every" else m: lr for (m, rank), lr in chosen.items()}
    best = str(folder_of(_best(results, grid.score).cell, grid))
    return Summary(list(rows.values()), pairs, lrs, notes, grid.score, grid.confidence, best, facts)


def _best(results: list[Result], score: str) -> Result:
    """By the loss on the validation split, so that no test item chooses; by the score where no run has that loss."""
    if judged := [r for r in results if r.score("eval_loss") is not None]:
        return min(judged, key=lambda r: r.score("eval_loss"))
    return max(results, key=lambda r: r.score(score))


def _row(key: tuple, lr: float, group: list[Result], confidence: float) -> ConfigurationRow:
    def mean(name: str) -> float | None:
        values = [r.metrics[name] for r in group if r.metrics.get(name) is not None]
        return sum(values) / len(values) if values else None

    scores = {}
    for name in NAMES:
        values = [r.score(name) for r in group if r.score(name) is not None]
        if values:
            scores[name] = over_seeds(values, confidence)
    first = group[0].metrics
    return ConfigurationRow(
        *key, lr, sorted(r.cell.seed for r in group), scores, first["trainable"], first["total"],
        mean("peak_bytes"), mean("seconds"), mean("cpu_seconds"), mean("tokens_per_second"),
    )  # fmt: skip


def _pairs(grid: CompareRecipe, shared: TrainRecipe, groups) -> list[tuple[tuple, tuple]]:
    """Every configuration against the reference method's (lora, else the first) of the same place in the grid."""
    reference = "lora" if "lora" in grid.methods else grid.methods[0]
    theirs, pairs = ranks_of(reference, grid, shared), []
    for method in (m for m in grid.methods if m != reference):
        ours = ranks_of(method, grid, shared)
        matched = list(zip(ours, theirs)) if len(ours) == len(theirs) else [(a, b) for a in ours for b in theirs]
        pairs += [((method, a, size), (reference, b, size)) for a, b in matched for size in grid.sizes or [None]]
    return [(a, b) for a, b in pairs if a in groups and b in groups]


def _compared(grid: CompareRecipe, shared: TrainRecipe, groups: dict[tuple, list[Result]], names: dict[tuple, str]) -> list[Pair]:
    """All pairs on all scores that they have, corrected over the pairs of one score."""
    order = _pairs(grid, shared, groups)
    differences = {(a, b, s): d for a, b in order for s in NAMES if (d := _difference(groups[a], groups[b], s, grid)) is not None}
    pairs = {}
    for score in NAMES:
        family = {key: difference for key, difference in differences.items() if key[2] == score}
        for (key, d), p in zip(family.items(), holm([d.p for d in family.values()])):
            a, b, _ = key
            visible = d.visible(len(family), grid.confidence)
            pairs[key] = Pair(names[a], names[b], score, d, p, visible, grid.confidence)
    return [pairs[key] for key in differences]


def _difference(a: list[Result], b: list[Result], score: str, grid: CompareRecipe) -> Difference | None:
    """a − b over the seeds that both finished; None without the score, or with too few seeds for a loss."""
    import numpy as np

    seeds = sorted({r.cell.seed for r in a} & {r.cell.seed for r in b})
    pairs = [[next(r for r in group if r.cell.seed == seed) for seed in seeds] for group in (a, b)]
    if not seeds or any(r.score(score) is None for group in pairs for r in group):
        return None
    if score == "eval_loss":
        figures = [[r.score(score) for r in group] for group in pairs]
        return paired_difference(*figures, grid.confidence) if len(seeds) > 1 else None
    right = [{task: np.stack([r.right[score][task] for r in group]) for task in group[0].right[score]} for group in pairs]
    return paired_bootstrap(*right, grid.resamples, grid.confidence)


def score_table(summary: Summary) -> TextTable:
    used = [name for name in NAMES if any(name in row.scores for row in summary.rows)]
    columns = ["method", "rank", "examples", "lr", "seeds", *(NAMES[name] for name in used)]
    columns += ["trained", "share", "peak memory", "time", "CPU time", f"{summary.facts.get('unit', 'tokens')}/s"]
    rows = []
    for row in summary.rows:
        cells = [row.method, str(row.rank or "-"), str(row.size or "-"), f"{row.lr:g}", str(len(row.seeds))]
        cells += [_estimate(row.scores.get(name), name) for name in used]
        cells += [f"{row.trainable:,}", f"{100 * row.trainable / row.total:.2f} %"]
        cells += ["-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB", f"{row.seconds:.0f} s"]
        rows.append([*cells, "-" if row.cpu_seconds is None else f"{row.cpu_seconds:.0f} s", f"{row.tokens_per_second:.0f}"])
    note = f"mean over seeds ± half of the {100 * summary.confidence:g} % interval (Student's t); time of the training alone"
    return TextTable("Scores and cost", columns, rows, note)


def pair_table(summary: Summary) -> TextTable:
    rows = []
    for pair in summary.pairs:
        d, lower = pair.difference, pair.score == "eval_loss"
        scale, digits, unit = (1, 4, "") if lower else (100, 1, " points")
        interval = f"[{scale * d.low:+.{digits}f}, {scale * d.high:+.{digits}f}]"
        verdict = ((pair.a if (d.mean < 0) == lower else pair.b) + " better") if pair.shown else "not shown"
        figures = [f"{scale * d.mean:+.{digits}f}{unit}", interval, f"{d.p:.3f}", f"{pair.corrected:.3f}"]
        rows.append([pair.a, pair.b, NAMES[pair.score], *figures, f"{scale * pair.visible:.{digits}f}", verdict])
    note = (
        "accuracy: paired bootstrap over items, Student's t over seeds; loss: Student's t over seeds. The verdict is by Holm's p, "
        "corrected for the comparisons on that score; visible: the difference that this comparison, so corrected, finds four times "
        'in five. "not shown" is not "equal".'
    )
    columns = ["a", "b", "score", "a - b", f"{100 * summary.confidence:g} % interval", "p", "p, Holm", "visible", "verdict"]
    return TextTable("Differences", columns, rows, note)


def _estimate(estimate: Estimate | None, name: str) -> str:
    if estimate is None:
        return "-"
    scale, digits, unit = (1, 4, "") if name == "eval_loss" else (100, 1, " %")
    half = "" if estimate.half is None else f" ± {scale * estimate.half:.{digits}f}"
    return f"{scale * estimate.mean:.{digits}f}{half}{unit}"
