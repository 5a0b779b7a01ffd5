"""The folder of a run: what a run writes into it, and what happens to a run that was there before.

`.doratune` in the folder lists the names that runs wrote. With `overwrite`, those of the run before are set aside in
OUTPUT/.replaced and removed when the new run has finished: a run that is killed leaves no mixture, and the one before is not lost.
Files of others stay where they are. Cost: a rename an entry.
"""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

import yaml

from ..errors import UserError
from ..support.durable import remove_leftovers, staged
from ..support.folders import LIST, entries, foreign_file, listed_files, refuse_no_folder, write_list
from ..support.yaml_text import read_yaml, to_yaml

ASIDE = ".replaced"
RECIPE, METRICS = "recipe.yaml", "metrics.json"
WRITTEN = (RECIPE, METRICS, "adapter", "model", "checkpoint-*", "runs", "scores", "loss.png", "samples", "status.json")
"""What `doratune train` writes."""


class RunFolder:
    """OUTPUT of one run.

    Args:
        written: names and patterns of what the run writes there.
    """

    def __init__(self, output: str | Path, written: tuple[str, ...] = WRITTEN):
        self.output, self.written = Path(output), written
        self.aside = self.output / ASIDE

    def check(self, overwrite: bool) -> None:
        """Raise UserError where something is in the way of a new run."""
        refuse_no_folder(self.output)
        names = [name for name in entries(self.output) if name != ASIDE]
        if names and not overwrite:
            raise UserError(f"{self.output} exists and is not empty; give another folder or pass --overwrite")
        own = self.own()
        if foreign := [name for name in names if _matches(name, self.written) and not _matches(name, own)]:
            raise foreign_file(self.output, foreign[0])

    def own(self) -> set[str]:
        """Names and patterns of what runs wrote here: by the folder's list; without one, by a recipe that a run wrote."""
        if (names := listed_files(self.output)) or not is_recorded(self.output / RECIPE):
            return names
        return {*WRITTEN, *(self.written if (self.output / "report.md").is_file() else ())}

    def begin(self) -> None:
        """Set the run aside that is here, and make the folder ready for a new one."""
        self.output.mkdir(parents=True, exist_ok=True)
        self.restore()
        remove_leftovers(self.output)
        names = [name for name in os.listdir(self.output) if _matches(name, self.own() - {LIST})]
        if (self.aside / METRICS).exists() and METRICS not in names:
            self._drop(names)  # what was begun over it and never finished; the last finished run stays aside
        elif names:
            self._drop([ASIDE])
            self.aside.mkdir()
            for name in sorted(names, key=lambda name: (name == RECIPE, name != METRICS)):
                os.rename(self.output / name, self.aside / name)
        stage = self.output / LIST
        with staged(self.output, LIST, folder=True) as folder:
            write_list(folder, {*self.own(), *self.written})
            os.replace(folder / LIST, stage)

    def restore(self) -> None:
        """Bring back a run that was being set aside when the process was killed: its recipe goes last."""
        if self.aside.is_dir() and not (self.aside / RECIPE).exists() and not (self.output / METRICS).exists():
            for name in os.listdir(self.aside):
                if not os.path.lexists(self.output / name):
                    os.rename(self.aside / name, self.output / name)
            self._drop([ASIDE])

    def finish(self) -> None:
        """The new run is whole: the one before it goes."""
        self._drop([ASIDE])

    def _drop(self, names: list[str]) -> None:
        """Remove entries, all in one act as far as a reader can tell."""
        present = [name for name in names if os.path.lexists(self.output / name)]
        if present:
            with staged(self.output, ASIDE, folder=True) as grave:
                for name in sorted(present, key=lambda name: (name == RECIPE, name != METRICS)):
                    os.rename(self.output / name, grave / name)


def is_recorded(path: Path) -> bool:
    """Did a run write this recipe? Then it is what YAML writes, without a comment or an order of a hand's."""
    try:
        settings = read_yaml(path)
        return {"model", "data", "output"} <= settings.keys() and path.read_text(encoding="utf-8") == to_yaml(settings)
    except (OSError, ValueError, AttributeError, yaml.YAMLError):  # UserError is a ValueError
        return False


def _matches(name: str, patterns) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
