"""A run's folder, read for the page. What is missing or broken becomes a line of warning, never an end.

Cost: the JSON files and the headers of the adapters' tensors; no weight is read.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.adapter import TENSORS
from ..errors import UserError
from ..support.absent import no_folder
from ..support.files import open_tensors, read_json
from ..support.yaml_text import read_yaml

MARKS = ("recipe.yaml", "metrics.json", "adapter", "model")
FIGURES = ("step", "loss", "eval_loss", "learning_rate", "instance_loss", "prior_loss")
"""Of a row of the log."""
Warn = Callable[[str], None]


@dataclass
class Scores:
    """The contents of a folder that `evaluate` wrote; empty where there is none."""

    folder: Path | None = None
    results: list[dict] = field(default_factory=list)
    averages: list[dict] = field(default_factory=list)

    def tasks(self) -> tuple[tuple[str, int], ...]:
        """(task, number of items), each once."""
        return tuple(sorted({(r["task"], r["total"]) for r in self.results}))


@dataclass
class Run:
    """One run; `recipe` and `metrics` are empty where their file is missing or broken."""

    folder: Path
    name: str
    state: str
    recipe: dict
    metrics: dict
    before: Scores
    after: Scores

    def number(self, key: str) -> float | None:
        """A figure of metrics.json, None unless it is a finite number."""
        return number(self.metrics.get(key))

    @property
    def log(self) -> list[dict]:
        """The rows of the log that name their step, with what is a number in them."""
        rows = self.metrics.get("log")
        entries = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        figures = [{key: number(row.get(key)) for key in FIGURES} for row in entries]
        return [row for row in figures if row["step"] is not None]


def number(value) -> float | None:
    with contextlib.suppress(OverflowError):  # a whole number of 400 digits
        return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
    return None


def is_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in MARKS) or any(folder.glob("checkpoint-*"))


def expand(folder: Path) -> list[Path]:
    """The runs in a folder: itself, or the cells of a comparison.

    Raises:
        UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {no_folder(folder)}; give the folder of a run of doratune train")
    cells = sorted(cell for cell in (folder / "cells").glob("*") if cell.is_dir())
    if cells:
        return cells
    if not is_run(folder):
        raise UserError(f"{folder} is no run: it holds none of {', '.join(MARKS)}, checkpoint-N; give the folder of doratune train")
    return [folder]


def read_run(folder: Path, name: str, base: Path | None, warn: Warn) -> Run:
    """Everything the page shows of a run.

    Args:
        base: scores of the base model, for a run without scores/before.
    """
    state, metrics = "finished", {}
    if not (folder / "metrics.json").is_file():
        state = "unfinished"
        warn(f"{name} is unfinished: it has no metrics.json; go on with doratune train --resume, or read its figures as missing")
    else:
        try:
            metrics = read_json(folder / "metrics.json", "train the run again")
        except UserError as error:
            state = "unreadable"
            warn(f"{name}: {error}")
    if isinstance(metrics.get("training"), dict):  # as doratune demo writes it
        metrics = metrics["training"]
    _check_shapes(folder, name, warn)
    before = read_scores(folder / "scores" / "before", name, warn)
    if not before.results and base is not None:
        before = read_scores(base, name, warn)
    recipe = _read_recipe(folder / "recipe.yaml", name, warn)
    return Run(folder, name, state, recipe, metrics, before, read_scores(folder / "scores" / "after", name, warn))


def _read_recipe(path: Path, name: str, warn: Warn) -> dict:
    try:
        recipe = read_yaml(path)
    except UserError:
        recipe, problem = None, "is not a readable YAML file" if path.exists() else "is missing"
    else:
        problem = "holds no settings"
    if isinstance(recipe, dict) and not _shallow(recipe):
        recipe, problem = None, "holds lists in lists without end"
    if isinstance(recipe, dict):
        return {str(key): value for key, value in recipe.items()}
    warn(f"{name}: {path} {problem}; its settings are not shown")
    return {}


def _shallow(value, levels: int = 4) -> bool:
    """Settings are flat; YAML can hold a list that holds itself, or a few lines that unfold to gigabytes."""
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else []
    return not parts or (levels > 0 and all(_shallow(part, levels - 1) for part in parts))


def read_scores(folder: Path, name: str, warn: Warn) -> Scores:
    """results.json, each entry checked; an evaluation that broke off has none."""
    if not folder.is_dir():
        return Scores()
    try:
        content = read_json(folder / "results.json", "score the run again")
    except UserError as error:
        warn(f"{name}: {error}")
        return Scores()
    lists = [content.get(key) if isinstance(content.get(key), list) else [] for key in ("results", "averages")]
    results = [[entry for entry in entries if _is_result(entry)] for entries in lists]
    if "results" not in content or any(len(a) != len(b) for a, b in zip(lists, results)):
        warn(f"{name}: {folder / 'results.json'} holds entries that are no results; score the run again")
    return Scores(folder, *results)


def _is_result(entry) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("task", "protocol")):
        return False
    right, total = number(entry.get("right")), number(entry.get("total"))
    return right is not None and total is not None and 0 <= right <= total and total > 0


def read_items(folder: Path | None, task: str, protocol: str, warn: Warn) -> list[dict]:
    """The items of TASK.PROTOCOL.jsonl, without lines that are broken; none where there is no such file."""
    name = f"{task}.{protocol}.jsonl"
    if folder is None or Path(name).name != name or not (folder / name).is_file():
        return []
    items, broken = [], []
    for count, line in enumerate((folder / name).read_bytes().splitlines(), 1):
        try:
            item = json.loads(line)
        except ValueError:
            item = None
        whole = isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("prompt", "output", "gold"))
        (items if whole else broken).append(item if whole else count)
    if broken:
        warn(f"{folder / name}: {len(broken)} lines are no items, the first is line {broken[0]}; score the run again")
    return items


def _check_shapes(folder: Path, name: str, warn: Warn) -> None:
    """The checkpoints of one run hold tensors of one set of shapes; a file that cannot be opened is said."""
    steps = sorted((int(p.name.split("-")[1]), p) for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name))
    last: tuple[Path, dict] | None = None
    for path in [p / TENSORS for _, p in steps] + [folder / "adapter" / TENSORS]:
        if not path.is_file():
            continue
        try:
            with open_tensors(path) as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except UserError as error:
            warn(f"{name}: {error}")
            continue
        if last and shapes != last[1]:
            different = next(key for key in {**shapes, **last[1]} if shapes.get(key) != last[1].get(key))
            there = " and ".join(f"{_words(s.get(different))} in {p.parent.name}" for p, s in (last, (path, shapes)))
            warn(f"{name}: its checkpoints are not of one run: {different} is {there}")
        last = path, shapes


def _words(shape: tuple | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
