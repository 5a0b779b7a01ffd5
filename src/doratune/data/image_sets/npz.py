"""MedMNIST's files: arrays of images and labels, for each split or for one.

    train_images (N, H, W) or (N, H, W, 3) uint8, train_labels (N, 1) whole numbers, val_…, test_…       or: images, labels

Classes are the labels' numbers as text. One label an image: ChestMNIST's fourteen are refused, as are volumes. Nothing
is unpickled.
Source: medmnist.com, numpy's npz. Cost: the split's images in memory, as large as they are unpacked.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError, listed
from . import ImageLayout, ImageSet, LabelledImage, Request, chosen_split, in_order, split_named

if TYPE_CHECKING:
    import numpy as np


class Arrays(ImageLayout):
    shown = "an .npz file as MedMNIST's (train_images, train_labels, …)"

    def suits(self, path: Path) -> bool:
        return path.is_file() and path.suffix.lower() == ".npz"

    def read(self, path: Path, request: Request) -> ImageSet:
        import numpy as np

        try:
            with open(path, "rb") as stream:  # numpy leaves it open where the archive is broken
                if not zipfile.is_zipfile(stream):
                    raise zipfile.BadZipFile("no archive")
                stream.seek(0)
                with np.load(stream, allow_pickle=False) as file:
                    return _read(file, path, request)
        except UserError:
            raise
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(f"{path} is truncated or no .npz file of plain arrays ({reason}); copy or download it again") from None


def _read(file, path: Path, request: Request) -> ImageSet:
    there = {split: name.removesuffix("images") for name in file.files if (split := _split_of(name)) is not None}
    if not there:
        held = listed(map(repr, file.files), 8) or "nothing"
        raise UserError(f"{path} holds {held}; expected train_images and train_labels as in MedMNIST's files")
    if list(there) == ["whole"] and request.said:
        raise UserError(f"{path} has no splits; give {path}")
    prefix = there["whole"] if list(there) == ["whole"] else chosen_split(there, request, path)
    labels = {name: _labels(file, f"{name}labels", path) for name in there.values()}
    images = _images(file, f"{prefix}images", path)
    if len(images) != len(labels[prefix]):
        raise UserError(f"{path}: {prefix}images holds {len(images)}, {prefix}labels {len(labels[prefix])}; one label an image")
    names = [f"{prefix}images[{i}]" for i in range(len(images))]
    items = [LabelledImage(name, label, pixels, f"{path}: {name}") for name, label, pixels in zip(names, labels[prefix], images)]
    return ImageSet(str(path), items, in_order({label for part in labels.values() for label in part}))


def _split_of(name: str) -> str | None:
    """The split of an array of images by its name; `whole` without one."""
    if name == "images":
        return "whole"
    before, _, kind = name.rpartition("_")
    return split_named(before) if kind == "images" else None


def _labels(file, name: str, path: Path) -> list[str]:
    """The labels as text.

    Raises:
        UserError: missing, several an image, or no whole numbers or text.
    """
    if name not in file.files:
        raise UserError(f"{path} has no {name}; each array of images needs its labels")
    labels = file[name]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        shape = " × ".join(map(str, labels.shape))
        raise UserError(f"{path}: {name} is {shape}; one label an image is learned, not several")
    if labels.dtype.kind not in "iubU" or (labels.dtype.kind == "i" and (labels < 0).any()):
        raise UserError(f"{path}: {name} holds {labels.dtype} that name no class; expected whole numbers from 0 on, or text")
    return [str(int(label)) if labels.dtype.kind != "U" else str(label) for label in labels]


def _images(file, name: str, path: Path) -> np.ndarray:
    """Pixels (N, H, W) or (N, H, W, C).

    Raises:
        UserError: another shape (a volume), or a type that no image has.
    """
    images = file[name]
    grey = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1)
    if not grey and not (images.ndim == 4 and images.shape[3] in (3, 4)):
        shape = " × ".join(map(str, images.shape))
        raise UserError(f"{path}: {name} is {shape}; expected images × height × width, or that × 1, 3 or 4: volumes are no images")
    if images.dtype.kind != "u" or images.dtype.itemsize > (2 if grey else 1):
        raise UserError(f"{path}: {name} holds {images.dtype}; expected uint8 (0 … 255), or uint16 for grey")
    return images


LAYOUTS = (Arrays(),)
