"""Labelled images for classification, one file a layout: where they lie, how each is named, which classes there are.

    folder.py   photos/CLASS/x.png, or photos/train/CLASS/x.png with photos/val and photos/test beside it
    table.py    a table of paths and labels: .csv, .tsv, .jsonl, .json, .parquet
    npz.py      MedMNIST's files: train_images, train_labels, val_images, …

A source is a path, with `:SPLIT` behind it for one of its splits and `[:N]` for the first N images: scans.npz:test[:100]. Without a
split it is the one that its use asks for: train of training data, val of evaluation data, test of a task. A layout is an instance
without state; files in this folder that hold `LAYOUTS` are found by themselves. Cost: listing; `usable` decodes each file once.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import UserError, listed
from ..images import image_of_array, open_image

if TYPE_CHECKING:
    from PIL import Image

Opens = TypeVar("Opens", bound=Any)
"""An item with `open()`."""
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
"""Split → what folders, arrays and cells call it."""
_AT_ONCE = 1024
"""Images that are handed to the threads before the first problem is looked for."""


@dataclass(frozen=True)
class LabelledImage:
    """One image of a set.

    Attributes:
        name: how records show it. label: the name of its class. source: path, bytes of a file, or pixels.
        where: its place in the list that names it ("scans.csv: item 3"), which begins messages; "" where the path says all.
    """

    name: str
    label: str
    source: Any
    where: str = ""

    @property
    def place(self) -> str:
        return self.where or self.name

    def open(self) -> Image.Image:
        """The image in RGB.

        Raises:
            UserError: it cannot be read, with its place and path.
        """
        if isinstance(self.source, Path | bytes):
            return open_image(self.source, self.where)
        return image_of_array(self.source, self.place)


@dataclass
class ImageSet:
    """The images of one split, in order, and every class that the source names, with or without images here.

    `notes` are lines to say: what was left out, and why."""

    source: str
    items: list[LabelledImage]
    classes: list[str]
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Images of each class, in the classes' order."""
        counts = dict.fromkeys(self.classes, 0)
        for item in self.items:
            counts[item.label] += 1
        return counts


@dataclass(frozen=True)
class Request:
    """What is wanted of a source.

    Attributes:
        split: train, val or test; said: did the user name it? columns: a table's own names of image, label, split.
        unusable: takes a line for each item that cannot be used, and the item is left out; None: the first stops.
    """

    split: str
    said: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    unusable: list[str] | None = None

    def refuse(self, problem: str) -> None:
        """An item that cannot be used."""
        if self.unusable is None:
            raise UserError(problem)
        self.unusable.append(problem)


class ImageLayout:
    """Subclasses declare and override."""

    shown: str
    """What it is, for messages."""

    def suits(self, path: Path) -> bool:
        """Is what lies at a path, which exists, of this layout by its name?"""
        raise NotImplementedError

    def read(self, path: Path, request: Request) -> ImageSet:
        """Its images.

        Raises:
            UserError: it is not what its name says, or has no such split.
        """
        raise NotImplementedError


@cache
def layouts() -> tuple[ImageLayout, ...]:
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    return tuple(one for module in modules for one in getattr(module, "LAYOUTS", ()))


def load_images(
    source: str, use: str = "train", columns: Mapping[str, str] | None = None, unusable: list[str] | None = None
) -> ImageSet:
    """The labelled images of one source; their files are not opened yet.

    Args:
        use: the split where the source does not say one.
        columns: of a table: {image: NAME, label: NAME, split: NAME}.
        unusable: takes a line for each item without image or label, and the item is skipped; None: the first stops.

    Raises:
        UserError: nothing there, no layout that is known, no such split, no image.
    """
    path, request, first = requested(source, use, columns, unusable, _known(), ("image", "label", "split"))
    layout = next((one for one in layouts() if one.suits(path)), None)
    if layout is None:
        raise UserError(f"{path}: no layout of labelled images has such a file; give {_known()}")
    images = layout.read(path, request)
    refuse_none(source, images.items, unusable)
    return replace(images, source=source, items=images.items[:first])


def requested(
    source: str, use: str, columns: Mapping[str, str] | None, unusable: list[str] | None, known: str, fields: Sequence[str]
) -> tuple[Path, Request, int | None]:
    """(path, what is wanted of it, how many of the first images) of a source as it is written.

    Args:
        known: what a source may be, for messages. fields: the columns of a table.

    Raises:
        UserError: nothing there, or a column that such a table does not have.
    """
    whole, first = (m[1], int(m[2])) if (m := re.fullmatch(r"(.+)\[:(\d+)\]", source)) else (source, None)
    path, split = place_of(whole)
    if not path.exists():
        raise UserError(f"{source}: no such images; give {known}")
    if unknown := [name for name in columns or {} if name not in fields]:
        raise UserError(f"columns names {unknown[0]!r}; a table of images has {', '.join(fields)}")
    return path, Request(split or use, bool(split), columns or {}, unusable), first


def refuse_none(source: str, items: Sequence[Any], unusable: list[str] | None) -> None:
    """Raise where a source holds no image at all, or none that can be used."""
    if not items:
        reason = f"; the first: {unusable[0]}" if unusable else ""
        raise UserError(f"{source} holds no image{' that can be used' if unusable else ''}{reason}")


def place_of(source: str) -> tuple[Path, str]:
    """(path, the split that is said), by its usual name."""
    before, _, behind = source.rpartition(":")
    if Path(source).exists() or not before or (split := split_named(behind)) is None:
        return Path(source), ""
    return Path(before), split


def _known() -> str:
    return ", ".join(one.shown for one in layouts())


def split_named(name: str) -> str | None:
    """The split that a word means."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def chosen_split(there: Mapping[str, Any], request: Request, path: Path) -> Any:
    """What a source has for the split that is wanted.

    Raises:
        UserError: it has others only.
    """
    if request.split not in there:
        raise UserError(f"{path} has no images for {request.split}; it has {', '.join(there)}: give {path}:SPLIT")
    return there[request.split]


def in_order(names: set[str]) -> list[str]:
    """Names of classes in order: by number where all are numbers, else by text."""
    if all(re.fullmatch(r"\d{1,18}", name) for name in names):
        return sorted(names, key=int)
    return sorted(names)


def usable(
    items: Sequence[Opens], unusable: list[str] | None = None, advance: Callable[[int], None] = lambda n: None
) -> list[Opens]:
    """Those items that can be opened: each file is decoded once, in threads, and forgotten again.

    Args:
        unusable: takes a line for each image that cannot be read, and the image is left out; None: the first stops.

    Raises:
        UserError: the first that cannot be read.
    """

    def problem(item: Opens) -> str | None:
        try:
            item.open()
        except UserError as error:
            return str(error)
        return None

    there = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, len(items), _AT_ONCE):
            part = items[start : start + _AT_ONCE]
            for item, line in zip(part, threads.map(problem, part)):
                if line is None:
                    there.append(item)
                elif unusable is None:
                    raise UserError(line)
                else:
                    unusable.append(line)
            advance(len(part))
    return there


def of_learnable_classes(images: ImageSet, unusable: list[str] | None = None) -> ImageSet:
    """The set without classes of fewer than two images: of one image nothing can be learned and held out.

    Raises:
        UserError: such a class, where `unusable` takes no line of it; fewer than two classes.
    """
    counts = images.counts()
    few = {name: count for name, count in counts.items() if count < 2}
    lines = [f"{images.source}: class {n!r} has {c or 'no'} image{'s' * (c == 0)}; give it two or more" for n, c in few.items()]
    if lines and unusable is None:
        raise UserError(f"{lines[0]}, remove it, or set bad_items: skip")
    if lines:
        unusable.extend(lines)
    classes = [name for name in images.classes if name not in few]
    if len(classes) < 2:
        raise UserError(f"{images.source} has {listed(map(repr, classes)) or 'no class'}; classification needs two classes or more")
    return replace(images, items=[item for item in images.items if item.label not in few], classes=classes)
