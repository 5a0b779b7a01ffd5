"""What the cells of a grid left behind: figures, and which items were right, read from their folders.

A cell is finished when its metrics.json is there and whole (it is written last) and its recipe is the grid's. Everything else is a
problem with a line of its own; the other cells still count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserError, listed
from ..support.files import read_json
from ..support.text import lines, read_text
from ..support.yaml_text import as_read_back, read_yaml
from ..training.recipe import TrainRecipe
from .cells import Cell, folder_of, recipe_of
from .recipe import CompareRecipe

PLACES = (
    "output",
    "resume",
    "overwrite",
    "tensorboard",
    "trust_remote_code",
    "source",
    "expected",
    "keep_checkpoints",
    "save_steps",
    "log_steps",
    "workers",
    "report_to",
    "sample_prompts",
    "sample_steps",
    "sample_tokens",
)
"""Settings that change nothing in a result."""

FIGURES = ("trainable", "total", "seconds", "tokens_per_second")
"""What a row of the table cannot do without."""


@dataclass(frozen=True)
class Result:
    """One finished cell."""

    cell: Cell
    metrics: dict
    accuracy: dict[str, float] = field(default_factory=dict)
    """{protocol: mean over tasks}."""
    right: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """{protocol: {task: (N,) 1 where right}}."""
    items: dict[str, str] = field(default_factory=dict)
    """{task and protocol: digest of its items}."""

    def score(self, name: str) -> float | None:
        """The figure that ranks: an accuracy, or the evaluation loss."""
        return self.metrics.get("eval_loss") if name == "eval_loss" else self.accuracy.get(name)


def finished(cell: Cell, grid: CompareRecipe, shared: TrainRecipe) -> Result | None:
    """The cell's result; None where it has not run, or not to its end.

    Raises:
        UserError: a file is corrupt, or the folder holds a run of another recipe.
    """
    folder = folder_of(cell, grid)
    if not (folder / "metrics.json").is_file():
        return None
    metrics = read_json(folder / "metrics.json", "delete it, and the cell runs again")
    if wrong := [name for name in FIGURES if not _finite(metrics.get(name))]:
        what = f"{wrong[0]} is {metrics.get(wrong[0])!r}" if wrong[0] in metrics else f"{wrong[0]} is missing"
        raise UserError(f"{folder / 'metrics.json'}: {what}; delete it, and the cell runs again")
    if grid.score == "eval_loss" and not _finite(metrics.get("eval_loss")):
        raise UserError(f"{folder / 'metrics.json'}: eval_loss is {metrics.get('eval_loss')!r}; not counted")
    if not _finite(metrics.get("eval_loss")):
        metrics["eval_loss"] = None
    same_recipe(folder / "recipe.yaml", recipe_of(cell, grid, shared))
    if not shared.tasks:
        return Result(cell, metrics)
    scores = folder / "scores" / "after"
    summary = read_json(scores / "results.json", "delete the cell's metrics.json, and it runs again")
    right: dict[str, dict[str, np.ndarray]] = {}
    items: dict[str, str] = {}
    try:
        named = [(str(r["task"]), str(r["protocol"]), int(r["total"])) for r in summary["results"]]
        protocols = {protocol for _, protocol, _ in named}
    except (KeyError, TypeError, ValueError):
        protocols = set()
    if not protocols or (grid.score != "eval_loss" and grid.score not in protocols):
        raise UserError(f"{scores / 'results.json'} holds no whole results; delete the cell's metrics.json, and it runs again")
    for task, protocol, total in named:
        verdicts, items[f"{task} ({protocol})"] = read_verdicts(scores / f"{task}.{protocol}.jsonl", total)
        right.setdefault(protocol, {})[task] = verdicts
    accuracy = {protocol: float(np.mean([v.mean() for v in tasks.values()])) for protocol, tasks in right.items()}
    return Result(cell, metrics, accuracy, right, items)


def _finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def read_verdicts(path: Path, count: int) -> tuple[np.ndarray, str]:
    """(1 where right, a share where an answer counts in part; digest of the questions and their answers)."""
    try:
        verdicts, digest = [], hashlib.sha256()
        for line in lines(read_text(path)):
            item = json.loads(line)
            verdicts.append(float(item.get("score", {True: 1.0, False: 0.0}[item["correct"]])))
            digest.update(json.dumps([item["prompt"], item["gold"]]).encode())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is missing or corrupt ({type(error).__name__}); delete the cell's folder, and it runs again"
        ) from None
    if len(verdicts) != count:
        raise UserError(f"{path} holds {len(verdicts)} items, its results {count}; delete the cell's folder, and it runs again")
    return np.asarray(verdicts, dtype=np.float64), digest.hexdigest()


def same_recipe(path: Path, wanted: TrainRecipe) -> None:
    """A finished run counts only for the recipe that made it; settings that a newer version added count as their defaults."""
    try:
        had = dataclasses.asdict(TrainRecipe()) | dict(read_yaml(path))
    except (TypeError, ValueError) as error:  # UserError is one
        reason = str(error).removeprefix(str(path)).lstrip(":, ")
        raise UserError(f"{path} is missing or corrupt ({reason}); delete the cell's folder, and it runs again") from None
    now = as_read_back(dataclasses.asdict(wanted))
    differing = [f"{name} {had[name]!r} there, {now[name]!r} here" for name in now if name not in PLACES and had[name] != now[name]]
    if differing:
        raise UserError(f"{path.parent} was run with another recipe ({listed(differing, 3)}); give another output, or delete it")


def collect(cells: list[Cell], grid: CompareRecipe, shared: TrainRecipe) -> tuple[list[Result], list[str]]:
    """(those of the cells that finished, a line for each problem)."""
    results, problems = [], []
    for cell in cells:
        try:
            result = finished(cell, grid, shared)
        except UserError as error:
            problems.append(str(error))
            continue
        if result is None:
            problems.append(f"{cell.name} is unfinished")
        else:
            results.append(result)
    return _of_same_items(results, grid, problems), problems


def _of_same_items(results: list[Result], grid: CompareRecipe, problems: list[str]) -> list[Result]:
    """The results that answered what most of them did: a task's file may have changed between two starts of a grid."""
    kinds = Counter(tuple(sorted(result.items.items())) for result in results)
    if len(kinds) < 2:
        return results
    usual = dict(kinds.most_common(1)[0][0])
    peers = [result for result in results if result.items == usual]
    for result in (result for result in results if result.items != usual):
        tasks = sorted(name for name in {*usual, *result.items} if usual.get(name) != result.items.get(name))
        problems.append(
            f"{folder_of(result.cell, grid)} answered other items of {listed(tasks, 3)} than {len(peers)} of {len(results)} cells; "
            "not counted: delete its metrics.json, and it runs again"
        )
    return peers
