"""A table of paths and labels, a row an image; a column may say its split.

    image,label,split
    scans/17.png,pneumonia,train

Columns are called image, label and split, or one of the usual names of these (USUAL), or what `columns` says. A path is taken from
the table's folder on. Of Parquet an image may be the bytes of a file, as `datasets` stores it. Cost: the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError, listed
from ..containers import container_of
from ..files import Item, placed, read_examples
from . import ImageLayout, ImageSet, LabelledImage, Request, chosen_split, in_order, split_named

USUAL = {
    "image": ("image", "path", "file", "file_name", "filename", "filepath", "file_path", "image_path", "image_file"),
    "label": ("label", "class", "target", "category", "diagnosis", "label_name", "class_name"),
    "split": ("split", "partition", "subset"),
}
"""What tables call a column."""


class ImageTable(ImageLayout):
    shown = "a table of paths and labels (.csv, .tsv, .jsonl, .parquet)"

    def suits(self, path: Path) -> bool:
        return path.is_file() and container_of(path) is not None

    def read(self, path: Path, request: Request) -> ImageSet:
        rows = read_examples(path, request.unusable)
        names = _columns(path, rows, request.columns) if rows else {}
        images: dict[str, list[LabelledImage]] = {}
        for row in rows:
            item, split, problem = _item(row, names, path.parent)
            if problem:
                request.refuse(placed(f"{row.where} {problem}", row))
            else:
                images.setdefault(split, []).append(item)
        if "split" in names and images:
            chosen = chosen_split(images, request, path)
        elif request.said:
            raise UserError(f"{path} has no column for the split; give {path}, or name the column: columns: {{split: NAME}}")
        else:
            chosen = images.get("", [])
        return ImageSet(str(path), chosen, in_order({item.label for part in images.values() for item in part}))


def _columns(path: Path, rows: Sequence[Item], columns: Mapping[str, str]) -> dict[str, str]:
    """image, label and perhaps split → the table's names.

    Raises:
        UserError: a column that is not there, or several that could be it.
    """
    there = {name: None for row in rows[:100] for name in row}
    names = {}
    for ours, usual in USUAL.items():
        if ours in columns:
            candidates = [columns[ours]]
            if columns[ours] not in there:
                raise UserError(f"columns: {ours} is {columns[ours]!r}, which {path} does not have; it has {_shown(there)}")
        else:
            taken = set(columns.values())
            candidates = [name for name in there if str(name).strip().lower() in usual and name not in taken]
        if len(candidates) > 1:
            raise UserError(f"{path}: {listed(map(repr, candidates))} may be the {ours}; say which: columns: {{{ours}: NAME}}")
        if not candidates and ours != "split":
            raise UserError(f"{path} has no column {ours!r}; it has {_shown(there)}: say which it is: columns: {{{ours}: NAME}}")
        if candidates:
            names[ours] = candidates[0]
    return names


def _shown(names) -> str:
    return listed(map(repr, names), 8)


def _item(row: Item, names: Mapping[str, str], folder: Path) -> tuple[LabelledImage | None, str, str | None]:
    """(the image, its split, or else why there is none)."""
    image, label = row.get(names["image"]), _text(row.get(names["label"]))
    if label is None:
        return None, "", f"has no label under {names['label']!r}"
    split = ""
    if "split" in names:
        said = _text(row.get(names["split"])) or ""
        split = split_named(said)
        if split is None:
            return None, "", f"has the split {said!r} under {names['split']!r}; expected train, val or test"
    if isinstance(image, Mapping):
        name, data = _text(image.get("path")) or row.where, image.get("bytes")
        if isinstance(data, bytes):
            return LabelledImage(name, label, data, row.where), split, None
        image = image.get("path")
    if (name := _text(image)) is None:
        return None, "", f"has no path of an image under {names['image']!r}"
    return LabelledImage(name, label, folder / name, row.where), split, None


def _text(value: Any) -> str | None:
    """A cell as text; None where it holds none."""
    if isinstance(value, str | int | float) and str(value).strip():
        return str(value).strip()
    return None


LAYOUTS = (ImageTable(),)
