"""Checkpoints of a run: each is complete in one act, the newest that is whole is resumed from, older ones go as a whole.

A checkpoint is written beside its name, synced and renamed, so a folder `checkpoint-N` holds all of its files. What a copy, a disk
or a hand damaged later is found before anything is loaded: JSON, safetensors headers with lengths, check sums in torch's zip files.
Cost: one pass over the optimizer's file when a run is resumed.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..support.durable import staged
from ..support.files import open_tensors, read_json
from ..support.folders import generation
from ..support.processes import agree, wait

STATE = "trainer_state.json"
OPTIMIZERS = ("optimizer", "global_step", "rank", "pytorch_model")
"""Beginnings of the names under which transformers and its engines write the optimizer's state."""
_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(output: Path, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest whole checkpoint of a run; those that are passed over are said."""
    for checkpoint in reversed(checkpoints(output)):
        if (problem := damage(checkpoint)) is None:
            return checkpoint
        say(f"{checkpoint} is passed over: {problem}")
    return None


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, in order of steps."""
    named = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named)]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where a run can go on from it."""
    try:
        state = read_json(checkpoint / STATE, "it is written last")
        for path in sorted(checkpoint.iterdir()):
            if path.suffix == ".safetensors":
                with open_tensors(path):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as file:
                    if torn := file.testzip():
                        return f"{path.name} is damaged at {torn}"
    except UserError as error:
        return str(error)
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        return f"{path.name} is truncated or damaged ({' '.join(str(error).split())[:120]})"
    unfinished = state.get("global_step", 0) < state.get("max_steps", 0)
    optimizer = [path.name for path in checkpoint.iterdir() if path.name.startswith(OPTIMIZERS)]
    if unfinished and not optimizer:
        return "the optimizer's state is missing"
    return None


@contextmanager
def whole_checkpoint(target: Path, writes: bool) -> Iterator[Path]:
    """A folder in which all processes write `target.name/…`; that becomes `target` when all have ended well.

    Args:
        writes: does this process publish?
    """
    if not writes:
        yield Path(agree(lambda: ""))
        wait()
        return
    with generation(target, stays=lambda name: False, key=STATE) as stage:
        yield Path(agree(lambda: str(stage)))
        wait()
        for path in list((stage / target.name).iterdir()):
            os.rename(path, stage / path.name)
        (stage / target.name).rmdir()


def remove_old(newest: Path, limit: int | None, best: str | None) -> None:
    """Keep the last `limit` checkpoints of the run, and the best; each other one goes in one act.

    Args:
        newest: the checkpoint that was just written. What counts is the step, not the time of a file, which a clock that jumps
            makes wrong; later steps than this one's are of a run that was resumed from an earlier, and go first.
    """
    if not limit or limit < 1:
        return
    every = checkpoints(newest.parent)
    step = {path: number for number, path in enumerate(every)}
    every.sort(key=lambda path: (step[path] <= step.get(newest, len(every)), step[path]))
    protected = {newest, *([Path(best)] if best else [])}
    surplus = len(every) - max(limit, len(protected))
    for path in [path for path in every if path not in protected][: max(0, surplus)]:
        with staged(newest.parent, path.name, folder=True) as grave:
            os.rename(path, grave / path.name)
