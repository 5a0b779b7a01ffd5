"""Items of one's own, of any of the tasks here, in a JSON, JSON lines or tabular file:

    {"task": "vqa", "image": "a.png", "question": "What shape is it?", "answer": "circle"}      or "answers": ["circle", …]
    {"task": "nlvr", "images": ["a.png", "b.png"], "question": "The same shape.", "answer": "true"}
    {"task": "caption", "image": "a.png", "answers": ["a red circle"]}
    {"task": "tvqa", "video": "clip.mp4", "question": "…", "answer": "red", "context": "subtitles", "span": [1.5, 9]}

`video` may be a folder of frames, in the order of their names. Paths begin beside the file. `id` names an item in records.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError, kind_in_words, listed, near_misses
from ..files import Item, read_examples
from . import Sight, VisualItem, span_of, tasks, text_of
from .nlvr import CHANCE, LABELS


def own_items(path: Path, unusable: list[str] | None = None) -> list[VisualItem]:
    """The items of a file.

    Args:
        unusable: takes a line for each item that cannot be used, and it is skipped; None: the first stops.

    Raises:
        UserError: an unreadable file, or an item without what its task needs.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give NAME:FOLDER of {', '.join(tasks())}, or a JSON file of your own")
    items = []
    for n, one in enumerate(read_examples(path, unusable), 1):
        try:
            items.append(_item(one, n, path))
        except UserError as error:
            if unusable is None:
                raise
            unusable.append(str(error))
    return items


def _item(one: Item, n: int, path: Path) -> VisualItem:
    where, task = one.where, one.get("task")
    if not isinstance(task, str) or task not in tasks():
        near = near_misses(str(task), tasks())
        raise UserError(f"{where}: task is {task!r}; expected one of {', '.join(tasks())}{near}")
    sights = _sights(one, where, path.parent)
    captions = tasks()[task].scored == "caption"
    question = "" if captions and "question" not in one else text_of(one, "question", where)
    context = one.get("context") or ""
    if not isinstance(context, str):
        raise UserError(f"{where}: context is {kind_in_words(context)}; expected a text")
    answers = _answers(one, where)
    chance = CHANCE if task == "nlvr" and {answer.lower() for answer in answers} <= {*LABELS.values()} else 0.0
    return VisualItem(task, str(one.get("id", n)), sights, question, answers, where, context, chance)


def _sights(one: Mapping, where: str, folder: Path) -> tuple[Sight, ...]:
    """What the item looks at: an image, two images, or a video."""
    named = [key for key in ("image", "images", "video") if one.get(key)]
    if len(named) != 1:
        held = listed(map(repr, named)) or "nothing to look at"
        raise UserError(f"{where} has {held}; give one of image, images, video")
    key, value = named[0], one[named[0]]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, str) and entry.strip() for entry in values):
        raise UserError(f"{where}: {key} is {str(value)[:60]!r}; expected the name of a file")
    if key == "video":
        if len(values) > 1:
            raise UserError(f"{where} has {len(values)} videos; a question is about one")
        if one.get("span") is not None and span_of(one["span"]) is None:
            raise UserError(f"{where}: span is {str(one['span'])[:60]!r}; expected seconds from and to, such as [1.5, 9]")
        return (Sight(str(folder / values[0]), True, span_of(one.get("span"))),)
    if len(values) > 2:
        raise UserError(f"{where} has {len(values)} images; a question is about one or two")
    return tuple(Sight(str(folder / entry)) for entry in values)


def _answers(one: Mapping, where: str) -> tuple[str, ...]:
    value: Any = one.get("answers", one.get("answer"))
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, str) and entry.strip() for entry in values):
        raise UserError(f"{where} has no answer: give answer, a text, or answers, a list of them")
    return tuple(entry.strip() for entry in values)
