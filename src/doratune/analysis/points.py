"""The points of Fig. 2 and Fig. 3: (ΔM, ΔD) per layer, module and checkpoint of a run, their regression line and correlation.

A run is a folder of `doratune train` (its checkpoint-N folders and its adapter), an adapter folder, or a folder of an ordinary
model (full fine-tuning, merged). Cost: one model in memory, one pass over the chosen weights for each checkpoint.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..attachment import detach
from ..checkpoint.adapter import CONFIG, load, read_folder
from ..errors import UserError, listed
from ..models import load_model
from .change import Change, adapter_changes, model_changes


@dataclass(frozen=True)
class Point:
    """One weight at one checkpoint; `layer` is its number in the model, `module` its last name (q_proj)."""

    name: str
    layer: int
    module: str
    step: int
    magnitude: float
    direction: float


@dataclass(frozen=True)
class Line:
    """Least squares of ΔM on ΔD over all points, and Pearson's correlation (Fig. 2)."""

    slope: float
    intercept: float
    correlation: float
    points: int


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, adapter or model folder), in order of steps; the final one last. A folder without steps is step 0.

    Raises:
        UserError: the folder holds neither.
    """
    if (run / CONFIG).is_file() or (run / "config.json").is_file():
        return [(0, run)]
    found = sorted((int(p.name.split("-")[1]), p) for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name))
    found = [(step, path) for step, path in found if (path / CONFIG).is_file() or (path / "config.json").is_file()]
    final = next((run / name for name in ("adapter", "model") if (run / name).is_dir()), None)
    if final is not None and (not found or not _same_file(found[-1][1], final)):
        found.append((found[-1][0] + 1 if found else 0, final))
    if not found:
        raise UserError(f"{run} holds no adapter, no model and no checkpoint; give the folder of a run")
    return found


def _same_file(checkpoint: Path, final: Path) -> bool:
    """Is the last checkpoint the final result? (it is written twice)"""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        files = [folder / name for folder in (checkpoint, final)]
        if all(f.is_file() for f in files):
            return filecmp.cmp(*files, shallow=False)
    return False


def points_of(base: nn.Module, run: str | Path, modules: tuple[str, ...] = (), magnitude_axis: str = "output") -> list[Point]:
    """The points of a run against its base model, which is left as it was.

    Args:
        modules: last names of the weights that count (the paper: query and value); none: all that changed by an adapter.

    Raises:
        UserError: no such run, an adapter or model that does not fit the base, modules that name nothing.
    """
    points = []
    for step, folder in checkpoints(Path(run)):
        for name, change in _changes(base, folder, modules, magnitude_axis):
            points.append(Point(name, layer_number(name), name.split(".")[-1], step, change.magnitude, change.direction))
    if not points:
        raise UserError(f"{run}: no weight is named {listed(modules)}; name modules as q_proj")
    return points


def _changes(base: nn.Module, folder: Path, modules: tuple[str, ...], axis: str) -> Iterator[tuple[str, Change]]:
    def counts(name: str) -> bool:
        return not modules or name.split(".")[-1] in modules

    if (folder / CONFIG).is_file():
        read_folder(folder)  # says what is wrong before the base is touched
        load(base, folder)
        try:
            yield from ((name, change) for name, change in adapter_changes(base).items() if counts(name))
        finally:
            detach(base)
        return
    names = [
        name for name, m in base.named_modules() if counts(name) and getattr(m, "weight", None) is not None and m.weight.dim() > 1
    ]
    after = load_model(str(folder), next(base.parameters()).dtype)
    yield from model_changes(base, after, names, axis).items()


def layer_number(name: str) -> int:
    """The first number in a module's name: its layer; -1 where there is none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def regression(points: list[Point]) -> Line:
    """ΔM on ΔD.

    Raises:
        UserError: fewer than three points, or no spread in one of the two.
    """
    pairs = torch.tensor([(p.direction, p.magnitude) for p in points], dtype=torch.float64)
    if len(points) < 3 or not (pairs.std(0) > 0).all():
        raise UserError(f"{len(points)} points without enough spread have no correlation; take more layers or checkpoints")
    x, y = (pairs - pairs.mean(0)).unbind(1)
    slope = (x * y).sum() / x.square().sum()
    correlation = (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()
    intercept = pairs[:, 1].mean() - slope * pairs[:, 0].mean()
    return Line(slope.item(), intercept.item(), correlation.item(), len(points))
