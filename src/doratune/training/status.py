"""Where a run is, in OUTPUT/status.json while it is not finished, and the runs of a folder.

    running        its process is alive: by its number and start on this machine; elsewhere by a file that is still written
    interrupted    a signal stopped it after a checkpoint, or its process is gone (killed, power)
    failed         it ended with an error, which is said
    finished       metrics.json is there; status.json is not

Cost: one small file at each line of the log.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import TrainerCallback

from ..errors import UserError
from ..support.absent import no_folder
from ..support.files import read_json, write_json
from ..support.processes import is_first
from ..support.yaml_text import read_yaml
from .folder import ASIDE, METRICS, RECIPE

STATUS = "status.json"
PARTS = (ASIDE, "adapter", "model", "runs", "scores", "samples", "merged")
"""Folders in a run's folder in which no runs are looked for, and `checkpoint-N`."""
SILENT_S = 900
"""Seconds without a word after which a run on another machine counts as interrupted."""


class RunStatus(TrainerCallback):
    """Keeps status.json while its block runs; the first of several processes writes."""

    def __init__(self, output: Path):
        self.path = output / STATUS
        self.facts = {"state": "running", "pid": os.getpid(), "started": _started(os.getpid()), "host": platform.node()}

    def __enter__(self) -> RunStatus:
        self._write(step=0, steps=None)
        return self

    def __exit__(self, kind, error, _):
        if kind is None:
            if is_first():
                self.path.unlink(missing_ok=True)
            return
        stopped = issubclass(kind, KeyboardInterrupt) or hasattr(error, "status")
        reason = " ".join(str(error).split())[:300] or kind.__name__
        with contextlib.suppress(OSError, UserError):  # a full disk is what the run ended with
            self._write(state="interrupted" if stopped else "failed", reason=reason)

    def on_train_begin(self, args, state, control, **kwargs):
        self._write(step=state.global_step, steps=state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        figures = {name: logs[name] for name in ("loss", "eval_loss") if logs and name in logs}
        self._write(step=state.global_step, steps=state.max_steps, **figures)

    def _write(self, **facts) -> None:
        if is_first():
            self.facts |= facts | {"updated": time.time()}
            write_json(self.path, self.facts)


def _started(pid: int) -> float | None:
    """When a process began; None where there is none, or where it cannot be told."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except (psutil.Error, OSError):
        return None


@dataclass
class RunEntry:
    """One line about a run."""

    folder: Path
    status: str
    method: str = ""
    model: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """{task and protocol: accuracy}."""
    note: str = ""
    changed: float = 0.0


def runs_in(folder: Path) -> list[RunEntry]:
    """The runs of `doratune train` in a folder and below it, the latest last.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {no_folder(folder)}; give the folder that holds runs")
    return sorted((entry_of(run) for run in _folders(folder)), key=lambda entry: entry.changed)


def _folders(folder: Path) -> Iterator[Path]:
    """Folders with a recipe and anything that a run wrote; what lies in a run is looked at too (cells of a comparison)."""
    marks = (METRICS, STATUS, "adapter", "model")
    if (folder / RECIPE).is_file() and (any((folder / mark).exists() for mark in marks) or any(folder.glob("checkpoint-*"))):
        yield folder
    with contextlib.suppress(OSError):
        for inner in sorted(folder.iterdir()):
            parts = inner.name in PARTS or inner.name.startswith("checkpoint-")
            if inner.is_dir() and not inner.is_symlink() and not (parts and (folder / RECIPE).is_file()):
                yield from _folders(inner)


def entry_of(run: Path) -> RunEntry:
    """What the files of a run say of it."""
    recipe, metrics, status = _settings(run / RECIPE), _facts(run / METRICS), _facts(run / STATUS)
    training = metrics.get("training") if isinstance(metrics.get("training"), dict) else metrics
    newest = max((path.stat().st_mtime for path in (run / RECIPE, run / METRICS, run / STATUS) if path.exists()), default=0.0)
    entry = RunEntry(run, "finished", str(recipe.get("method", "")), str(recipe.get("model", "")), changed=newest)
    if (run / METRICS).is_file():
        entry.step = entry.steps = training.get("steps")
        entry.loss, entry.eval_loss = training.get("final_loss"), training.get("eval_loss")
        entry.note = training.get("warning") or ("" if metrics else f"{METRICS} is not readable")
    else:
        entry.status, entry.note = _unfinished(status, run)
        entry.step, entry.steps = status.get("step"), status.get("steps")
        entry.loss, entry.eval_loss = status.get("loss"), status.get("eval_loss")
    results = _facts(run / "scores" / "after" / "results.json").get("results")
    for result in results if isinstance(results, list) else []:
        with contextlib.suppress(KeyError, TypeError):
            entry.scores[f"{result['task']} {result['protocol']}"] = float(result["accuracy"])
    return entry


def _unfinished(status: dict, run: Path) -> tuple[str, str]:
    """(status, note) of a run without metrics.json."""
    if status.get("state") in ("interrupted", "failed"):
        return status["state"], str(status.get("reason", ""))
    if status.get("state") == "running":
        if status.get("host") != platform.node():
            alive = time.time() - float(status.get("updated") or 0) < SILENT_S
        else:
            alive = status.get("started") is not None and _started(int(status.get("pid") or 0)) == status["started"]
        if alive:
            return "running", f"process {status.get('pid')} on {status.get('host')}"
    on = f"go on with doratune train {run / RECIPE} --resume" if any(run.glob("checkpoint-*")) else "it has no checkpoint"
    return "interrupted", on


def _facts(path: Path) -> dict:
    try:
        return read_json(path, "")
    except UserError:
        return {}


def _settings(path: Path) -> dict:
    try:
        settings = read_yaml(path)
    except (UserError, OSError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}
