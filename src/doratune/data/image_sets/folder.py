"""A folder with a folder for each class; above these there may be one for each split.

    photos/CLASS/…/x.png                    one set
    photos/train/CLASS/…/x.png, photos/val  a set for each split

An image is what ends as one (`images.SUFFIXES`); other files are counted and said. Cost: listing the folders.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import UserError, listed
from ..images import is_image_name
from . import ImageLayout, ImageSet, LabelledImage, Request, chosen_split, split_named

_NO_CLASSES = ("__MACOSX",)
_QUIET = ("Thumbs.db", "desktop.ini")


class ClassFolders(ImageLayout):
    shown = "a folder with a folder for each class (photos/CLASS/x.png)"

    def suits(self, path: Path) -> bool:
        return path.is_dir()

    def read(self, path: Path, request: Request) -> ImageSet:
        inside = _folders(path)
        splits = {split_named(name): folder for name, folder in inside.items() if split_named(name) and _folders(folder)}
        if splits:
            return _set_of(chosen_split(splits, request, path))
        if request.said:
            raise UserError(f"{path} has no folders for splits; give {path}, or put the classes into {path}/{request.split}")
        return _set_of(path)


def _folders(path: Path) -> dict[str, Path]:
    """The folders in a folder, in order, without hidden ones."""
    names = sorted(name for name in os.listdir(path) if not name.startswith(".") and name not in _NO_CLASSES)
    return {name: path / name for name in names if (path / name).is_dir()}


def _set_of(folder: Path) -> ImageSet:
    """The images below the folders of the classes."""
    classes, items, other = _folders(folder), [], 0
    loose = [name for name in sorted(os.listdir(folder)) if is_image_name(name) and (folder / name).is_file()]
    for label, place in classes.items():
        for current, folders, names in os.walk(place):
            folders.sort()
            pictures = [name for name in sorted(names) if is_image_name(name)]
            other += sum(not name.startswith(".") and name not in _QUIET for name in names) - len(pictures)
            items += [LabelledImage(str(Path(current) / name), label, Path(current) / name) for name in pictures]
    if not items:
        what = f"{len(loose)} images, but no folder of a class" if loose else "no images in folders of classes"
        raise UserError(f"{folder} holds {what}; expected {folder}/CLASS/x.png for each class")
    notes = [f"{folder}: {other} files are no images by their names, and left out"] if other else []
    if loose:
        notes.append(f"{folder}: {len(loose)} images lie beside the classes' folders, and are left out: {listed(loose, 3)}")
    return ImageSet(str(folder), items, list(classes), notes)


LAYOUTS = (ClassFolders(),)
