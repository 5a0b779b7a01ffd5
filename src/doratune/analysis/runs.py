"""A run's folder as the analysis sees it: its checkpoints in order, and a short name that tells it from the others.

A run is a folder of `doratune train` (its checkpoint-N folders and its adapter), an adapter folder, or a folder of an ordinary
model (full fine-tuning, merged). Cost: names of files; the last checkpoint's file is compared with the final one's.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.adapter import CONFIG
from ..errors import UserError


def names(folders: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]  # a link keeps its name
    for depth in range(1, max(map(len, parts), default=0) + 1):
        ends = ["/".join(p[-depth:]) for p in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(folder) for folder in folders]


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, adapter or model folder), in order of steps; the final one last. A folder without steps is step 0.

    Raises:
        UserError: the folder holds no adapter, no model and no checkpoint.
    """
    if (run / CONFIG).is_file() or (run / "config.json").is_file():
        return [(0, run)]
    steps = sorted((int(p.name.split("-")[1]), p) for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name))
    steps = [(step, path) for step, path in steps if (path / CONFIG).is_file() or (path / "config.json").is_file()]
    final = next((run / name for name in ("adapter", "model") if (run / name).is_dir()), None)
    if final is not None and (not steps or not _same_file(steps[-1][1], final)):
        steps.append((steps[-1][0] + 1 if steps else 0, final))
    if not steps:
        raise UserError(f"{run} holds no adapter, no model and no checkpoint; give the folder of a run")
    return steps


def last_result(runs: Sequence[str | Path]) -> Path | None:
    """The last adapter or model of the first run that has one."""
    for run in runs:
        with contextlib.suppress(UserError):
            return checkpoints(Path(run))[-1][1]
    return None


def _same_file(checkpoint: Path, final: Path) -> bool:
    """Is the last checkpoint the final result? (it is written twice)"""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        files = [folder / name for folder in (checkpoint, final)]
        if all(f.is_file() for f in files):
            return filecmp.cmp(*files, shallow=False)
    return False
