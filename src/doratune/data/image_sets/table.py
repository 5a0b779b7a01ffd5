"""A table of paths and labels, a row an image; a column may say its split.

    image,label,split
    scans/17.png,pneumonia,train

Columns are called image, label and split, or one of the usual names of these (USUAL), or what `columns` says. A path is taken from
the table's folder on. Of Parquet an image may be the bytes of a file, as `datasets` stores it. Cost: the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...errors import UserError, listed
from ..containers import container_of
from ..files import Item, placed, read_examples
from . import ImageLayout, ImageSet, LabelledImage, Request, chosen_split, in_order, split_named

T = TypeVar("T")
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
        chosen, everything = rows_of_split(path, request, USUAL, _item)
        return ImageSet(str(path), chosen, in_order({item.label for item in everything}))


def rows_of_split(
    path: Path,
    request: Request,
    usual: Mapping[str, Sequence[str]],
    read: Callable[[Item, Mapping[str, str], Path], tuple[T | None, str | None]],
) -> tuple[list[T], list[T]]:
    """(the items of the split that is wanted, those of all splits) of a table.

    Args:
        usual: what tables call each column; all but `split` have to be there.
        read: (row, our columns → the table's, its folder) → (the item, or None and why there is none).

    Raises:
        UserError: a column that is missing or told by several names; a row that cannot be used, unless the request takes its line.
    """
    rows = read_examples(path, request.unusable)
    names = column_names(path, rows, request.columns, usual) if rows else {}
    splits: dict[str, list[T]] = {}
    for row in rows:
        split, problem = _split_of(row, names)
        item, reason = (None, problem) if problem else read(row, names, path.parent)
        if item is None:
            request.refuse(placed(f"{row.where} {reason}", row))
        else:
            splits.setdefault(split, []).append(item)
    everything = [item for part in splits.values() for item in part]
    if "split" in names and splits:
        return chosen_split(splits, request, path), everything
    if request.said:
        raise UserError(f"{path} has no column for the split; give {path}, or name the column: columns: {{split: NAME}}")
    return splits.get("", []), everything


def column_names(
    path: Path, rows: Sequence[Item], columns: Mapping[str, str], usual: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Our columns → the table's names.

    Args:
        columns: those that the user says. usual: what tables call each.

    Raises:
        UserError: a column that is not there, or several that could be it.
    """
    there = {name: None for row in rows[:100] for name in row}
    names = {}
    for ours, known in usual.items():
        if ours in columns:
            candidates = [columns[ours]]
            if columns[ours] not in there:
                raise UserError(f"columns: {ours} is {columns[ours]!r}, which {path} does not have; it has {_shown(there)}")
        else:
            taken = set(columns.values())
            candidates = [name for name in there if str(name).strip().lower() in known and name not in taken]
        if len(candidates) > 1:
            raise UserError(f"{path}: {listed(map(repr, candidates))} may be the {ours}; say which: columns: {{{ours}: NAME}}")
        if not candidates and ours != "split":
            raise UserError(f"{path} has no column {ours!r}; it has {_shown(there)}: say which it is: columns: {{{ours}: NAME}}")
        if candidates:
            names[ours] = candidates[0]
    return names


def _shown(names) -> str:
    return listed(map(repr, names), 8)


def _split_of(row: Item, names: Mapping[str, str]) -> tuple[str, str | None]:
    """(a row's split, "" where the table has none; or else why there is none)."""
    if "split" not in names:
        return "", None
    said = cell_text(row.get(names["split"])) or ""
    split = split_named(said)
    return split or "", None if split else f"has the split {said!r} under {names['split']!r}; expected train, val or test"


def cell_image(row: Item, column: str, folder: Path) -> tuple[str, Path | bytes] | None:
    """(name, path or bytes) of an image in a cell: a path, or as `datasets` stores one; None where there is none."""
    value = row.get(column)
    if isinstance(value, Mapping):
        if isinstance(data := value.get("bytes"), bytes):
            return cell_text(value.get("path")) or row.where, data
        value = value.get("path")
    name = cell_text(value)
    return None if name is None else (name, folder / name)


def _item(row: Item, names: Mapping[str, str], folder: Path) -> tuple[LabelledImage | None, str | None]:
    """(the image, or else why there is none)."""
    label, image = cell_text(row.get(names["label"])), cell_image(row, names["image"], folder)
    if label is None:
        return None, f"has no label under {names['label']!r}"
    if image is None:
        return None, f"has no path of an image under {names['image']!r}"
    return LabelledImage(image[0], label, image[1], row.where), None


def cell_text(value: Any) -> str | None:
    """A cell as text; None where it holds none."""
    if isinstance(value, str | int | float) and str(value).strip():
        return str(value).strip()
    return None


LAYOUTS = (ImageTable(),)
