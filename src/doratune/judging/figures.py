"""From judgments to figures: means by category and turn, shares of wins, each with an interval over questions.

The interval is the percentile bootstrap over questions (both turns of a question stay together): 10,000 resamples, seed 0. What
could not be read is in no mean; its share is beside it. Two orders that disagree are a tie, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..support.tables import aligned
from .cases import Case
from .ledger import Ledger, verdict

RESAMPLES = 10_000


def single_figures(cases: Sequence[Case], ledger: Ledger) -> dict:
    """Means of the ratings (1 to 10): by category and turn, by turn, over all; None where nothing could be read."""
    rows = [(case, verdict(case, ledger.of(case) or "")) for case in cases]
    groups: dict[str, dict] = {}
    for category in [*dict.fromkeys(case.question.category for case in cases), "all"]:
        own = [(case, score) for case, score in rows if category in ("all", case.question.category)]
        turns = {f"turn_{turn}": _mean([(c, s) for c, s in own if c.turn == turn]) for turn in sorted({c.turn for c, _ in own})}
        groups[category] = turns | {"mean": _mean(own), "interval": interval(own), "judgments": len(own), "unparsable": _lost(own)}
    return {"model": cases[0].models[0], "categories": groups}


def pair_figures(cases: Sequence[Case], ledger: Ledger) -> dict:
    """Of the questions' turns: won, lost and tied by the first model; `win_rate` counts a tie as half."""
    first, second = cases[0].models
    outcomes: list[tuple[Case, float | None]] = []
    disagreed = 0
    for one, other in zip(cases[::2], cases[1::2], strict=True):
        a, b = (verdict(case, ledger.of(case) or "") for case in (one, other))
        points = [_points(a, first_is_a=True), _points(b, first_is_a=False)]
        disagreed += None not in points and points[0] != points[1]
        outcomes.append((one, None if None in points else points[0] if points[0] == points[1] else 0.5))
    counts = {name: sum(score == value for _, score in outcomes) for name, value in (("won", 1.0), ("lost", 0.0), ("tied", 0.5))}
    shares = {"judgments": len(cases), "orders_disagree": disagreed / len(outcomes), "unparsable": _lost(outcomes)}
    return {"model": first, "against": second} | counts | {"win_rate": _mean(outcomes), "interval": interval(outcomes)} | shares


def _points(name: str | None, first_is_a: bool) -> float | None:
    return {None: None, "tie": 0.5, "A": float(first_is_a), "B": float(not first_is_a)}[name]


def _mean(rows: Sequence[tuple[Case, float | None]]) -> float | None:
    scores = [score for _, score in rows if score is not None]
    return sum(scores) / len(scores) if scores else None


def _lost(rows: Sequence[tuple[Case, float | None]]) -> float:
    return sum(score is None for _, score in rows) / len(rows)


def interval(rows: Sequence[tuple[Case, float | None]], confidence: float = 0.95) -> list[float] | None:
    """Bootstrap interval of the mean over questions; None with fewer than two that could be read."""
    by_question: dict[int, list[float]] = {}
    for case, score in rows:
        if score is not None:
            by_question.setdefault(case.question.number, []).append(score)
    if len(by_question) < 2:
        return None
    sums = np.array([sum(scores) for scores in by_question.values()])
    counts = np.array([len(scores) for scores in by_question.values()])
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return [float(edge) for edge in np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])]


def single_table(figures: dict) -> str:
    """A line a category."""
    turns = sorted({key for group in figures["categories"].values() for key in group if key.startswith("turn_")})
    head = ["category", *(key.replace("_", " ") for key in turns), "mean", "95 % interval", "judgments", "unparsable"]
    rows = []
    for name, group in figures["categories"].items():
        cells = [name, *(_shown(group.get(key)) for key in turns), _shown(group["mean"]), _between(group["interval"])]
        rows.append([*cells, str(group["judgments"]), f"{100 * group['unparsable']:.1f} %"])
    return "\n".join([f"MT-Bench, {figures['model']}, ratings of 1 to 10", *aligned(head, rows)])


def pair_table(figures: dict) -> str:
    """One line."""
    head = ["won", "lost", "tied", "win rate", "95 % interval", "orders disagree", "unparsable"]
    percent: Callable[[float | None], str] = lambda share: "-" if share is None else f"{100 * share:.1f} %"  # noqa: E731
    row = [str(figures[name]) for name in ("won", "lost", "tied")] + [percent(figures["win_rate"])]
    edges = figures["interval"]
    row += ["-" if edges is None else f"{100 * edges[0]:.1f} – {100 * edges[1]:.1f} %"]
    row += [percent(figures["orders_disagree"]), percent(figures["unparsable"])]
    return "\n".join([f"MT-Bench, {figures['model']} against {figures['against']}, both orders", *aligned(head, [row])])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _between(edges: list[float] | None) -> str:
    return "-" if edges is None else f"{edges[0]:.2f} – {edges[1]:.2f}"
