"""Tasks of images and video that are answered in text, one file a task: its published files become items.

    vqa.py       VQAv2: a question, ten answers          gqa.py       GQA: a question, one answer
    nlvr.py      NLVR2: a sentence about two images      caption.py   COCO: five captions an image
    tvqa.py      TVQA: video, subtitles, five choices    how2qa.py    How2QA: the same with four
    tvc.py       TVC: a moment of a video, described     yc2c.py      YouCook2: the same
    own.py       a JSON file of one's own, of any of these tasks

A source is `NAME:PLACE`, the folder with the published files; `NAME:PLACE:val` says another part than its use asks for, `[:N]`
takes the first N. Without a name it is a file of one's own. Nothing is fetched, and nothing that is looked at is opened here.
Files in this folder that hold `TASKS` are found by themselves. Layouts: the sets' own downloads, and VALUE's (Li 2021) of the
video sets.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from ...errors import UserError, near_misses
from ..image_sets import split_named


@dataclass(frozen=True)
class Sight:
    """What is looked at: an image, or a video or a part of it.

    Attributes:
        path: of an image file; of a video's file, or of the folder of its frames. video: is it one?
        span: seconds from and to, where a part counts.
    """

    path: str
    video: bool = False
    span: tuple[float, float] | None = None

    @property
    def key(self) -> str:
        """Its name in an index of features."""
        return self.path if self.span is None else f"{self.path}@{self.span[0]:g}-{self.span[1]:g}"


@dataclass(frozen=True)
class VisualItem:
    """One question, statement or thing to be described.

    Attributes:
        sights: one, or two images. question: "" of what is only described. answers: every right one, people's own among them.
        context: what is said beside it (subtitles), the first to be cut. where: its place, which begins a message.
        chance: share that guessing among its choices gets right; 0 of a free answer.
    """

    task: str
    name: str
    sights: tuple[Sight, ...]
    question: str
    answers: tuple[str, ...]
    where: str
    context: str = ""
    chance: float = 0.0

    @property
    def prompt(self) -> str:
        """The task's prefix and the question."""
        return f"{self.task}: {self.question}".rstrip()


class VisualTask:
    """Subclasses declare and override; an instance has no state."""

    name: str
    """Also the prefix of its text."""
    shown: str
    """Its published files, for messages."""
    scored: Literal["soft", "exact", "caption"]
    """By VQA's soft accuracy, as the very text, or by CIDEr."""

    def items(self, place: Path, split: str) -> list[VisualItem]:
        """The items of a part: train, val or test.

        Raises:
            UserError: a file that is missing, malformed, or without answers.
        """
        raise NotImplementedError


@cache
def tasks() -> dict[str, VisualTask]:
    """Every task by its name."""
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    return {one.name: one for module in modules for one in getattr(module, "TASKS", ())}


def load_visual_items(source: str, use: str = "train", unusable: list[str] | None = None) -> list[VisualItem]:
    """The items of one source, in order.

    Args:
        use: the part where the source does not say one: train or val.
        unusable: takes a line for each item of a file of one's own that cannot be used; None: the first stops.

    Raises:
        UserError: nothing there, no such task, a file that cannot be used.
    """
    from .own import own_items

    task, place, split, first = parsed(source)
    if not place.exists():
        raise UserError(f"{source}: {place} is not there; {known()}")
    items = own_items(place, unusable) if task is None else task.items(place, split or use)
    if task is not None and (twice := [name for name, count in Counter(item.name for item in items).items() if count > 1]):
        raise UserError(f"{place} has {twice[0]} twice; copy the published file again")
    if not items:
        reason = f"; the first: {unusable[0]}" if unusable else ""
        raise UserError(f"{source} holds no item that can be used{reason}")
    return items[:first]


def parsed(source: str) -> tuple[VisualTask | None, Path, str, int | None]:
    """(task, place, part that is said, number of items that is said) of a source.

    Raises:
        UserError: a task's name without a place, or a name that is none.
    """
    whole, first = (m[1], int(m[2])) if (m := re.fullmatch(r"(.+)\[:(\d+)\]", source)) else (source, None)
    name, colon, rest = whole.partition(":")
    if Path(whole).exists() or not colon:
        if name in tasks():
            raise UserError(f"{source} names a task and no place; give {name}:FOLDER with {tasks()[name].shown}")
        return None, Path(whole), "", first
    if name not in tasks():
        raise UserError(f"{source}: no task is called {name!r}{near_misses(name, tasks())}; {known()}")
    before, _, behind = rest.rpartition(":")
    split = split_named(behind) if before and not Path(rest).exists() else None
    return tasks()[name], Path(before if split else rest), split or "", first


def known() -> str:
    return f"give NAME:FOLDER of {', '.join(tasks())}, or a JSON file of your own"


def first_there(folder: Path, inside: Sequence[str], names: Sequence[str]) -> str:
    """Where one of these names lies in the folders inside a folder, the first that is there; else the first of all."""
    places = [folder / where / name for where in inside for name in names]
    return str(next((place for place in places if place.exists()), places[0]))


def span_of(value) -> tuple[float, float] | None:
    """Seconds from and to, as the video sets write them: "1.5-9", [1.5, 9]; None where nothing of the kind stands."""
    if isinstance(value, str) and (m := re.fullmatch(r"\s*([\d.]+)\s*-\s*([\d.]+)\s*", value)):
        value = [m[1], m[2]]
    if not isinstance(value, list) or len(value) != 2:
        return None
    try:
        start, end = map(float, value)
    except (TypeError, ValueError):
        return None
    return (start, end) if 0 <= start < end else None


def text_of(entry: Mapping, key: str, where: str) -> str:
    """A text of an entry that says something.

    Raises:
        UserError: none.
    """
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} has no text under {key!r}")
    return value.strip()
