"""An output that is, holds or lies in an input of the same command is refused before anything is loaded.

Files and folders are compared by device and number, so a relative path, a link, another case or another mount of one folder is the
same one. Cost: a stat of each ancestor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError

PARTS = ("adapter", "model", "merged", "scores", "data")
"""Folders within a run's folder that another command's output must not touch."""


def refuse_inputs(output: str | Path, inputs: Mapping[str, str | Sequence[str] | None], runs: Sequence[str | Path] = ()) -> None:
    """Raise UserError where the output is, holds, or lies in an input.

    Args:
        inputs: {what it is: path or paths}; hub ids and names of published data are no paths, and are passed over.
        runs: folders of runs whose parts are inputs: an output may lie beside those parts, `RUN/analysis`, but not be RUN.
    """
    for what, value in inputs.items():
        for path in [value] if isinstance(value, str | Path) else value or []:
            _refuse(Path(output), what, _existing(str(path)), within=True)
    for run in map(Path, runs):
        if is_artifact(run):
            _refuse(Path(output), "the input", run, within=True)
            continue
        _refuse(Path(output), "the run", _existing(str(run)), within=False)
        for part in [run / name for name in PARTS] + sorted(run.glob("checkpoint-*")) if run.is_dir() else []:
            _refuse(Path(output), "the run's", _existing(str(part)), within=True)


def is_artifact(folder: Path) -> bool:
    """An adapter or a model, into which no command writes another output."""
    return any((folder / name).is_file() for name in ("adapter_config.json", "baseline_config.json", "config.json"))


def run_of(adapter: str | Path | None) -> list[Path]:
    """The run's folder that holds an adapter folder; none for an adapter that lies by itself."""
    if adapter is None:
        return []
    parent = Path(os.path.realpath(adapter)).parent
    return [parent] if (parent / "recipe.yaml").is_file() else []


def _existing(value: str) -> Path | None:
    """The path of an input on this machine: a folder, a file, `file.json[:100]`."""
    for name in (value, re.sub(r"\[:\d+\]$", "", value)):
        if name and os.path.exists(name):
            return Path(name)
    return None


def _refuse(output: Path, what: str, path: Path | None, within: bool) -> None:
    if path is None:
        return
    here, there = _identity(output), _identity(path)
    if here is not None and here == there:
        relation = "is"
    elif within and there in _ancestors(output):
        relation = "lies in"
    elif here is not None and here in _ancestors(path):
        relation = "holds"
    else:
        return
    raise UserError(
        f"output {output} {relation} {what} {path}, which this command reads and --overwrite does not replace; give another output"
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _ancestors(path: Path) -> set[tuple[int, int] | None]:
    """What lies above a path, both as it is written and with its links followed."""
    chains = [Path(os.path.abspath(path)), Path(os.path.realpath(path))]
    return {_identity(folder) for chain in chains for folder in chain.parents} - {None}
