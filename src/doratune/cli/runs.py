"""`doratune runs FOLDER`: the runs in a folder, with status, steps and scores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .arguments import parse
from .output import print_json, say

EXAMPLE = "doratune runs runs/"


@dataclass(kw_only=True)
class RunsSettings:
    """List the runs of doratune train in a folder: running, interrupted, failed or finished, with steps, losses and scores.

    Args:
        folder: folder that holds runs; also the word after the command
    """

    folder: str = "runs"


def main(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        argv = ["--folder", *argv]
    settings, as_json = parse(RunsSettings, argv, "runs", EXAMPLE)
    from ..support.tables import aligned
    from ..training.status import runs_in

    entries = runs_in(Path(settings.folder))
    if not entries:
        say(f"{settings.folder} holds no runs of doratune train")
    else:
        header = ("run", "status", "method", "step", "loss", "evaluation", "scores", "note")
        for line in aligned(header, [_row(entry) for entry in entries]):
            say(line.rstrip())
        finished = [str(entry.folder) for entry in entries if entry.status == "finished"]
        if finished:
            say(f"next: doratune report {' '.join(finished[-3:])} --output report.html")
    if as_json:
        print_json([{**dataclasses.asdict(entry), "folder": str(entry.folder)} for entry in entries])
    return 0


def _row(entry) -> tuple[str, ...]:
    step = "-" if entry.step is None else str(entry.step)
    step += f"/{entry.steps}" if entry.steps is not None and entry.status != "finished" else ""
    losses = ["-" if loss is None else f"{loss:.4f}" for loss in (entry.loss, entry.eval_loss)]
    scores = ", ".join(f"{name} {100 * accuracy:.1f} %" for name, accuracy in entry.scores.items()) or "-"
    return str(entry.folder), entry.status, entry.method, step, *losses, scores, entry.note
