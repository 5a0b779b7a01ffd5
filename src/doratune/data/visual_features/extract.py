"""Features of all that a source's items look at: read from the file where it is whole, else made by the image tower.

The file's name says the source and a digest of tower, sizes, places and names: other settings and other data are another file. One
that is older than something it was made of is refused; of a part that was stopped, the rows before that go on. A sight that several
items share is one row. Cost: one pass of the tower over every image, and over every frame that is taken; afterwards the times of
the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import UserError
from ...support.image_towers import ImageTower
from ...support.processes import agree
from ..visual_tasks import Sight, VisualItem
from .pictures import pictures_of
from .settings import FeatureSettings
from .store import FeatureFile, FeatureWriter, partial_of

AT_ONCE = 16
"""Pictures in one forward of the tower."""


@dataclass
class Features:
    """The features of a source's sights.

    Attributes:
        names: of the rows. problems: why a sight could not be read, of those that were tried now.
    """

    file: FeatureFile
    names: Mapping[Sight, str]
    problems: Mapping[Sight, str] = field(default_factory=dict)

    def __getitem__(self, sight: Sight) -> Tensor:
        """(n, S) in fp32: a row a cell or frame.

        Raises:
            UserError: nothing could be read of it.
        """
        return self.file[self.names[sight]]

    def usable(self, items: Sequence[VisualItem], unusable: list[str]) -> list[VisualItem]:
        """The items whose sights all have features; `unusable` takes a line for each other."""
        there = []
        for item in items:
            lacking = next((sight for sight in item.sights if not self.file.holds(self.names[sight])), None)
            if lacking is None:
                there.append(item)
                continue
            usual = f"{lacking.path}: not readable when {self.file.path} was made"
            unusable.append(f"{item.where}: {self.problems.get(lacking, usual)}")
        return there


def features_of(
    items: Sequence[VisualItem], label: str, tower: ImageTower, settings: FeatureSettings, skip: bool = False
) -> Features:
    """Features of everything that the items look at.

    Args:
        label: what the file's name begins with.
        skip: leave the row of what cannot be read empty.

    Raises:
        UserError: a sight that cannot be read, with its item (what was made before it stays); a file that cannot be written.
    """
    names = _names(items)
    path = Path(settings.features) / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label)}-{_digest(names, tower, settings)}.safetensors"
    places = {sight: item.where for item in reversed(items) for sight in item.sights}

    def make() -> dict[Sight, str]:
        if not path.is_file():
            return _Extraction(path, names, places, tower, settings, skip).run()
        if (newer := _changed(list(names), path)) < len(names):
            sight = list(names)[newer]
            raise UserError(f"{sight.path} was changed after {path} was made; remove that file, it is made again")
        return {}

    problems = agree(make)
    return Features(FeatureFile(path, tower.fingerprint), names, problems)


def _names(items: Sequence[VisualItem]) -> dict[Sight, str]:
    """Each sight once, with its name: where it is."""
    sights = dict.fromkeys(sight for item in items for sight in item.sights)
    return {sight: os.path.realpath(sight.path) + sight.key[len(sight.path) :] for sight in sights}


def _changed(sights: Sequence[Sight], made: Path) -> int:
    """The number of the first that was changed after a file was written; how many there are where none was."""
    written = made.stat().st_mtime_ns
    for number, sight in enumerate(sights):
        with contextlib.suppress(OSError):  # not there (any more)
            if os.stat(sight.path).st_mtime_ns > written:
                return number
    return len(sights)


def _digest(names: Mapping[Sight, str], tower: ImageTower, settings: FeatureSettings) -> str:
    sizes = [settings.cells, settings.frames, settings.frame_rate]
    facts = json.dumps([tower.fingerprint, *sizes, [[name, sight.video] for sight, name in names.items()]])
    return hashlib.sha256(facts.encode("utf-8", "surrogatepass")).hexdigest()[:12]


@dataclass
class _Extraction:
    """The making of one file, from where an earlier attempt was stopped."""

    path: Path
    names: Mapping[Sight, str]
    places: Mapping[Sight, str]
    """Of the items that look at them, for messages."""
    tower: ImageTower
    settings: FeatureSettings
    skip: bool
    problems: dict[Sight, str] = field(default_factory=dict)

    def run(self) -> dict[Sight, str]:
        """Write the file; why a sight could not be read, of those made now."""
        from PIL import Image

        size = self.tower.grid([Image.new("RGB", (64, 64))], 1).shape[-1]
        most = max(self.settings.frames if sight.video else self.settings.cells for sight in self.names)
        names, partial = list(self.names.values()), partial_of(self.path)
        going_on = _changed(list(self.names), partial) if partial.is_file() else 0
        with FeatureWriter(self.path, names, most, size, self.tower.fingerprint, going_on) as writer:
            label = f"features of {self.path.name.rpartition('-')[0]}"
            with tqdm(total=len(self.names), initial=writer.done, desc=label, unit="item", file=sys.stderr) as bar:
                left = list(self.names)[writer.done :]
                for part in (left[i : i + AT_ONCE] for i in range(0, len(left), AT_ONCE)):
                    for sight, row in zip(part, self._rows(part)):
                        writer.add(row, sight.path)
                    bar.update(len(part))
            writer.finish()
        return self.problems

    def _rows(self, part: Sequence[Sight]) -> list[Tensor | None]:
        """(n, S) of each sight; None of those that cannot be read."""
        pictures = [self._pictures(sight) for sight in part]
        images = [shown[0] for sight, shown in zip(part, pictures) if shown and not sight.video]
        grids = iter(self.tower.grid(images, self.settings.cells) if images else ())
        rows: list[Tensor | None] = []
        for sight, shown in zip(part, pictures):
            if not shown:
                rows.append(None)
            elif sight.video:
                rows.append(torch.cat([self.tower.whole(shown[i : i + AT_ONCE]) for i in range(0, len(shown), AT_ONCE)]))
            else:
                rows.append(next(grids))
        return rows

    def _pictures(self, sight: Sight) -> list:
        try:
            return pictures_of(sight, self.settings.frames, self.settings.frame_rate)
        except UserError as error:
            if not self.skip:
                raise UserError(f"{self.places[sight]}: {error}") from None
            self.problems[sight] = str(error)
            return []
