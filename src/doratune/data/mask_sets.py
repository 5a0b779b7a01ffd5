"""Images with masks for segmentation: where they lie, and which mask belongs to which image.

    photos/images/a.jpg, photos/masks/a.png         pairs by name, also in folders below
    photos/train/images, photos/train/masks, …      parts: train, val, test
    photos/images/train, photos/masks/train, …      the same the other way round (ADE20K: images/training, annotations/training)
    scans.csv (.tsv, .jsonl, .parquet)              columns image, mask, perhaps split; of Parquet also the files' bytes

A source is written as in `image_sets/`: a path, `:SPLIT`, `[:N]`. Cost: listing; the files are opened by `usable`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError, listed
from .containers import container_of
from .files import Item
from .image_sets import Request, chosen_split, refuse_none, requested, split_named
from .image_sets.table import USUAL as OF_LABELS
from .image_sets.table import cell_image, rows_of_split
from .images import is_image_name
from .masks import SUFFIXES, MaskedImage

IMAGES = ("images", "image", "img")
MASKS = ("masks", "mask", "annotations", "labels", "segmentation")
"""What the two folders of a set are called."""
USUAL = {
    "image": OF_LABELS["image"],
    "mask": ("mask", "mask_path", "mask_file", "annotation", "segmentation", "segmentation_map", "seg_map"),
    "split": OF_LABELS["split"],
}
"""What tables call a column."""
_KNOWN = "a folder with images/ and masks/, or a table of both paths (.csv, .tsv, .jsonl, .parquet)"


@dataclass
class MaskedSet:
    """The pairs of one split, in order; `notes` are lines to say: what was left out, and why."""

    source: str
    items: list[MaskedImage]
    notes: list[str] = field(default_factory=list)


def load_masked(
    source: str, use: str = "train", columns: Mapping[str, str] | None = None, unusable: list[str] | None = None
) -> MaskedSet:
    """The images of one source with their masks; the files are not opened yet.

    Args:
        use: the split where the source does not say one.
        columns: of a table: {image: NAME, mask: NAME, split: NAME}.
        unusable: takes a line for each image without a mask, and the image is skipped; None: the first stops.

    Raises:
        UserError: nothing there, no layout that is known, no such split, no image.
    """
    path, request, first = requested(source, use, columns, unusable, _KNOWN, ("image", "mask", "split"))
    if path.is_dir():
        pairs = _of_folder(path, request)
    elif container_of(path) is not None:
        pairs = MaskedSet(source, rows_of_split(path, request, USUAL, _item)[0])
    else:
        raise UserError(f"{path}: no layout of images with masks has such a file; give {_KNOWN}")
    refuse_none(source, pairs.items, unusable)
    return MaskedSet(source, pairs.items[:first], pairs.notes)


def _item(row: Item, names: Mapping[str, str], folder: Path) -> tuple[MaskedImage | None, str | None]:
    """(the pair in a row of a table, or else why there is none)."""
    image, mask = cell_image(row, names["image"], folder), cell_image(row, names["mask"], folder)
    if image is None or mask is None:
        what = "image" if image is None else "mask"
        return None, f"has no path of {'an image' if image is None else 'a mask'} under {names[what]!r}"
    return MaskedImage(image[0], image[1], mask[1], row.where), None


def _of_folder(path: Path, request: Request) -> MaskedSet:
    """The pairs of the split that is wanted, wherever the splits stand."""
    inside = _folders(path)
    splits = {split: both for name, folder in inside.items() if (split := split_named(name)) and (both := _both(folder))}
    if both := _both(path):
        images, masks = map(_folders, both)
        splits |= {split_named(name): (images[name], masks[name]) for name in images if split_named(name) and name in masks}
    if splits:
        return _pairs(*chosen_split(splits, request, path), request)
    if both is None:
        held = listed([f"{name}/" for name in inside], 5) or "no folder"
        raise UserError(f"{path} holds {held}; expected {path}/images and {path}/masks with files of the same names")
    if request.said:
        raise UserError(f"{path} has no folders for splits; give {path}, or make {path}/{request.split}/images and …/masks")
    return _pairs(*both, request)


def _both(folder: Path) -> tuple[Path, Path] | None:
    """The folders of images and of masks in a folder."""
    there = {name.lower(): place for name, place in _folders(folder).items()}
    images, masks = (next((there[name] for name in names if name in there), None) for names in (IMAGES, MASKS))
    return (images, masks) if images and masks else None


def _folders(path: Path) -> dict[str, Path]:
    return {name: path / name for name in sorted(os.listdir(path)) if not name.startswith(".") and (path / name).is_dir()}


def _pairs(images: Path, masks: Path, request: Request) -> MaskedSet:
    """The images below one folder with the masks of their names below the other."""
    pictures, numbers = _by_stem(images, is_image_name), _by_stem(masks, lambda name: name.lower().endswith(SUFFIXES))
    if not pictures:
        raise UserError(f"{images} holds no images; put them there, and masks of the same names into {masks}")
    items = []
    for stem, files in pictures.items():
        there = numbers.get(stem, [])
        if not there:
            request.refuse(f"{files[0]}: no mask {masks / stem}.png; write it, or remove the image")
        elif len(files) > 1 or len(there) > 1:
            both = files if len(files) > 1 else there
            request.refuse(f"{both[0]} and {both[1].name} have one name; rename one, so that image and mask are a pair")
        else:
            items.append(MaskedImage(str(files[0]), files[0], there[0]))
    alone = [str(files[0]) for stem, files in numbers.items() if stem not in pictures]
    notes = [f"{masks}: {len(alone)} masks belong to no image, and are left out: {listed(alone, 3)}"] if alone else []
    return MaskedSet(str(images.parent), items, notes)


def _by_stem(folder: Path, fits) -> dict[str, list[Path]]:
    """Path below the folder without its ending → the files that have it, in order."""
    files: dict[str, list[Path]] = {}
    for current, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if fits(name) and not name.startswith("."):
                place = Path(current) / name
                files.setdefault(str(place.relative_to(folder).with_suffix("")), []).append(place)
    return files
