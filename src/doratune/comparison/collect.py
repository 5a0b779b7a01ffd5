"""What the cells of a grid left behind: figures, and which items were right, read from their folders.

A cell is finished when its metrics.json is there and whole (it is written last) and its recipe is the grid's. Everything else is a
problem with a line of its own; the other cells still count.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from ..checkpoint.files import read_json
from ..errors import UserError, listed
from ..training.recipe import TrainRecipe
from .cells import Cell, folder_of, recipe_of
from .recipe import CompareRecipe

PLACES = ("output", "resume", "overwrite", "tensorboard", "source", "expected", "keep_checkpoints", "save_steps", "log_steps")
"""Settings that change nothing in a result."""


@dataclass(frozen=True)
class Result:
    """One finished cell."""

    cell: Cell
    metrics: dict
    accuracy: dict[str, float] = field(default_factory=dict)
    """{protocol: mean over tasks}."""
    right: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """{protocol: {task: (N,) 1 where right}}."""

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
    _same_recipe(folder / "recipe.yaml", recipe_of(cell, grid, shared))
    if not shared.tasks:
        return Result(cell, metrics)
    scores = folder / "scores" / "after"
    summary = read_json(scores / "results.json", "delete the cell's metrics.json, and it runs again")
    right: dict[str, dict[str, np.ndarray]] = {}
    for result in summary.get("results", []):
        task, protocol = result["task"], result["protocol"]
        right.setdefault(protocol, {})[task] = _verdicts(scores / f"{task}.{protocol}.jsonl", result["total"])
    accuracy = {protocol: float(np.mean([v.mean() for v in tasks.values()])) for protocol, tasks in right.items()}
    return Result(cell, metrics, accuracy, right)


def _verdicts(path: Path, count: int) -> np.ndarray:
    try:
        lines = [json.loads(line)["correct"] for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is missing or corrupt ({type(error).__name__}); delete the cell's folder, and it runs again"
        ) from None
    if len(lines) != count:
        raise UserError(f"{path} holds {len(lines)} items, its results {count}; delete the cell's folder, and it runs again")
    return np.asarray(lines, dtype=np.float64)


def _same_recipe(path: Path, wanted: TrainRecipe) -> None:
    """A finished run counts only for the recipe that made it; settings that a newer version added count as their defaults."""
    try:
        had = yaml.safe_load(path.read_text(encoding="utf-8"))
        had = dataclasses.asdict(TrainRecipe()) | dict(had)
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is missing or corrupt ({type(error).__name__}); delete the cell's folder, and it runs again"
        ) from None
    now = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(wanted)))
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
    return results, problems
