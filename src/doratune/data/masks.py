"""One mask: the class number of each pixel, in a file that keeps numbers as they are, beside the image that it belongs to.

    8 or 16 bit grey    the numbers themselves
    palette             the palette's indices: its colours are for the eye
    one bit             0 and 1
    255, 65,535         ignored (IGNORED here): of no class, or nobody knows
    RGB, RGBA, JPEG     refused: colours name no class, and JPEG changes numbers

`reduce_labels` is transformers' word for sets in which 0 is of no class (ADE20K): 0 is ignored, and 1 is the first class. Source:
Pillow. Cost: decoding the files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError, listed
from ..support.files import read_json
from ..support.text import lines, read_text
from .encode import IGNORED
from .images import decoded, open_image, upright

if TYPE_CHECKING:
    from PIL import Image

NO_CLASS = (255, 65_535)
"""Numbers that are of no class, whatever the model has."""
LOSSLESS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")
"""How the names of masks end, in a folder of them."""
_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """What the numbers in masks mean."""

    class_names: str | list[str] = ""
    """Of masks: the names of the classes 0, 1, …: a list, a text file with a name a line, or a .json file of id2label;
    default: those of the model's own head, else the numbers that occur."""
    reduce_labels: bool = False
    """Of masks in which 0 is of no class and 1 is the first (ADE20K): the name of transformers' image processors for it."""


@dataclass(frozen=True)
class MaskedImage:
    """An image and its mask.

    Attributes:
        name: how records show it. image, mask: path, or bytes of a file.
        where: its place in the list that names it ("scans.csv: item 3"), which begins messages; "" where the paths say all.
        classes: how many the model has; None: not known yet. reduced: is 1 the first class in the file?
    """

    name: str
    image: Path | bytes
    mask: Path | bytes
    where: str = ""
    classes: int | None = None
    reduced: bool = False

    @property
    def place(self) -> str:
        return self.where or self.name

    def open(self) -> tuple[Image.Image, np.ndarray]:
        """The image in RGB and its class numbers (H, W) as int64, IGNORED where there is none.

        Raises:
            UserError: one of the two cannot be read, their sizes differ, or a number is none of the classes.
        """
        image, numbers = open_image(self.image, self.where), self.numbers()
        if image.size != numbers.shape[::-1]:
            sizes = [f"{width} × {height}" for width, height in (numbers.shape[::-1], image.size)]
            raise UserError(f"{self.place}: the mask is {sizes[0]} and the image {sizes[1]}; write the mask at the image's size")
        return image, numbers

    def numbers(self) -> np.ndarray:
        """The class numbers alone."""
        values = decoded(self.mask, self.where, _numbers)
        nothing = np.isin(values, NO_CLASS) | ((values == 0) if self.reduced else False)
        highest = int(values[~nothing].max()) if not nothing.all() else None
        if highest is None:
            raise UserError(f"{self.place}: no pixel of the mask {self._shown} is of a class; remove the pair, or mend the mask")
        if self.classes is not None and highest - self.reduced >= self.classes:
            first, last = int(self.reduced), self.classes - 1 + self.reduced
            least = int(values[~nothing].min())
            raised = "set reduce_labels: true if 1 is the first class, " if highest == last + 1 and least > 0 else ""
            raise UserError(
                f"{self.place}: the mask {self._shown} holds the class number {highest}, and the model has {self.classes} classes, "
                f"{first} to {last}; {raised}name all classes (class_names), or write 255 where there is none"
            )
        values -= self.reduced
        values[nothing] = IGNORED
        return values

    @property
    def _shown(self) -> str:
        return "inside" if isinstance(self.mask, bytes) else os.fspath(self.mask)


def _numbers(image: Image.Image, name: str) -> np.ndarray:
    """The numbers in a decoded mask, as int64."""
    if image.format not in LOSSLESS:
        raise UserError(f"{name}: a mask in {image.format}, which does not keep class numbers; write it as PNG")
    if image.mode not in _MODES:
        raise UserError(
            f"{name}: a mask of colours ({image.mode}), which name no class; write each pixel's class number as a PNG "
            "of grey or with a palette, as Pillow's Image.fromarray does of uint8 numbers"
        )
    return np.asarray(upright(image)).astype(np.int64)


def class_numbers(items: Sequence[MaskedImage]) -> set[int]:
    """The class numbers that occur; masks that cannot be read are left to `usable`."""
    numbers: set[int] = set()
    for item in items:
        try:
            values = np.unique(item.numbers())
        except UserError:
            continue
        numbers |= set(values[values != IGNORED].tolist())
    return numbers


def names_of_classes(said: str | Sequence[str]) -> list[str] | None:
    """The names of the classes in order, from a list or a file; None where none are said.

    Raises:
        UserError: a file that is missing or holds no names, fewer than two, or one that is there twice.
    """
    if not said:
        return None
    names = _read_names(Path(said)) if isinstance(said, str) else [str(name) for name in said]
    place = f"class_names: {said}" if isinstance(said, str) else "class_names"
    if len(names) < 2:
        raise UserError(f"{place} holds {len(names)} names; segmentation needs two classes or more")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{place} holds {listed(map(repr, twice), 3)} twice; a class has a name of its own")
    return names


def _read_names(path: Path) -> list[str]:
    """The names in a text file, or in JSON: an id2label, or a config with one."""
    if not path.is_file():
        raise UserError(f"class_names is {str(path)!r}, which is no file; give a list of names, or a file with a name a line")
    if path.suffix.lower() != ".json":
        try:
            return [line.strip() for line in lines(read_text(path)) if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"class_names: {path} is no text in UTF-8 ({error}); write a name a line") from None
    held = read_json(path, "give id2label of a model's config, or a text file with a name a line")
    held = held["id2label"] if isinstance(held.get("id2label"), dict) else held
    if sorted(held) != sorted(map(str, range(len(held)))) or not all(isinstance(name, str) for name in held.values()):
        raise UserError(f'class_names: {path} is no id2label; expected {{"0": NAME, "1": NAME, …}}, a number for each class')
    return [held[str(i)] for i in range(len(held))]
