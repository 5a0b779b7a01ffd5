"""The images that an item names: a file in the image folder, or bytes that the item holds itself; opened when they are needed.

    name.jpg, sub/name.jpg      in the folder of `images`, else beside the data file
    an absolute path            as it is
    data:image/png;base64,…     the bytes themselves
    {"path": …, "bytes": …}     as `datasets` stores an image

What would have to be fetched (http://…) is refused: a run's data are files. Cost: none, until one is opened.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, kind_in_words, listed
from .images import open_image

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ImageSource:
    """Where one image is: a path, or its bytes; `shown` names it in messages."""

    place: str | bytes
    shown: str


def opened(source: ImageSource) -> Image.Image:
    """The image in RGB, upright.

    Raises:
        UserError: it is missing, broken or no image; named by its path.
    """
    return open_image(source.place) if isinstance(source.place, str) else open_image(source.place, source.shown)


def source_of(value: Any, folders: Sequence[str | Path]) -> ImageSource:
    """The source that a value of an item names, in the first of the folders that has it.

    Raises:
        UserError: a value that names no file and holds no bytes.
    """
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return ImageSource(value["bytes"], str(value.get("path") or "an image of its own"))
        value = next((value[key] for key in ("path", "url", "image") if isinstance(value.get(key), str)), None)
    if isinstance(value, bytes):
        return ImageSource(value, "an image of its own")
    if not isinstance(value, str) or not value.strip():
        held = "nothing" if value is None else "an empty text" if isinstance(value, str) else kind_in_words(value)
        raise UserError(f"the image is {held}; expected the name of a file")
    if value.startswith("data:"):
        return ImageSource(_decoded(value), f"{value[:30]}…")
    if "://" in value and not value.startswith("file://"):
        raise UserError(f"the image {value[:100]} would have to be fetched; download it and name the file")
    name = value.removeprefix("file://")
    if Path(name).is_absolute():
        return ImageSource(name, name)
    places = [str(Path(folder) / name) for folder in folders] or [name]
    place = next((place for place in places if Path(place).exists()), places[0])
    return ImageSource(place, place)


def _decoded(value: str) -> bytes:
    """The bytes of a data URI."""
    head, _, text = value.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"the image {value[:30]}… is no data in Base64; write it as a file") from None


def folders_of(images: str | None, source: str) -> list[str]:
    """Where the images of a data file are looked for: the folder of the settings, else beside the file.

    Raises:
        UserError: a folder that is not there.
    """
    if images is not None and not Path(images).is_dir():
        raise UserError(f"images is {images!r}, which is no folder; give the folder that the images' names begin in")
    beside = Path(source) if Path(source).is_dir() else Path(source).parent
    return [images] if images is not None else [str(beside)]


def named_images(item: Mapping, where: str) -> list:
    """The values of an item that name its images, in order; `where` begins a message.

    Raises:
        UserError: images under both keys.
    """
    named = [key for key in ("image", "images") if item.get(key)]
    if len(named) > 1:
        raise UserError(f"{where} has images under {listed(map(repr, named))}; leave one")
    value = item[named[0]] if named else []
    return list(value) if isinstance(value, list | tuple) else [value]
