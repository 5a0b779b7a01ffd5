"""One image as a model's processor takes it: RGB, upright, 8 bits a channel; what cannot be read is one line with its place.

    EXIF            the picture is turned as its camera says
    alpha           laid over white, as a viewer shows it; what lies under transparent pixels is never seen
    palette, CMYK   converted; a CMYK JPEG of Adobe's is inverted as it has to be (Pillow does)
    16 bit grey     the whole range 0 … 65,535 becomes 0 … 255: Pillow's own conversion would clip it to white
    32 bit, float   refused: nothing says which value is white
    animations      the first frame; a TIFF of several pages is refused, since each may be a picture of its own

Formats: those of FORMATS that this Pillow can read, and no other: some of Pillow's readers (EPS) start programs. More pixels than
Pillow's limit are refused. Source: Pillow. Cost: decoding the image.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

T = TypeVar("T")
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm", ".avif")
"""How the names of image files end, in a folder of them."""
_SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose grey beyond 8 bits is 0 … 65,535 where Pillow holds it in 32 bits."""
_FILTERS = threading.Lock()
_BACKGROUND = "white"
_WORDS = "JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, PPM or AVIF"


def open_image(source: str | os.PathLike | bytes, where: str = "") -> Image.Image:
    """The RGB image in a file, or in the bytes of one; decoded, its file closed.

    Args:
        where: the place of the item that names it ("train.json: item 3"), which begins the message.

    Raises:
        UserError: a file that is missing, empty, no image, truncated, too large, or of pixels that have no 8-bit meaning.
    """
    return decoded(source, where, _picture)


def _picture(image: Image.Image, name: str) -> Image.Image:
    """What a decoded image shows, in RGB."""
    grey = image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS)
    if grey:
        with _quietly():
            image = _of_eight_bits(image)
    return _rgb(upright(image), name)


def decoded(source: str | os.PathLike | bytes, where: str, read: Callable[[Image.Image, str], T]) -> T:
    """What `read` makes of a decoded image and its name for messages; its file is closed behind it.

    Raises:
        UserError: a file that is missing, empty, no image, truncated or too large; what `read` raises.
    """
    from PIL import Image, UnidentifiedImageError

    data = isinstance(source, bytes)
    name = ": ".join(filter(None, (where, "" if data else os.fspath(source)))) or "the image"
    stream = io.BytesIO(source if data else _bytes_of(source, name))
    if not stream.getbuffer().nbytes:
        raise UserError(f"{name}: an empty file (0 bytes); copy the image again or remove it")
    Image.init()
    try:
        with _quietly():
            image = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
            _refuse_pages(image, name)
        with image:
            image.load()
            return read(image, name)
    except UnidentifiedImageError:
        dicom = stream.getvalue()[128:132] == b"DICM"
        fix = "write its window of values as PNG first" if dicom else "convert or remove it"
        raise UserError(f"{name}: {'DICOM, which is ' if dicom else ''}no {_WORDS} image; {fix}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise UserError(f"{name}: an image of more than {limit}; make it smaller or cut it into tiles") from None
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{name}: a truncated or damaged image ({reason}); copy it again or remove it") from None


def image_of_array(pixels: np.ndarray, where: str = "the array") -> Image.Image:
    """The RGB image of an array of pixels.

    Args:
        pixels: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, or grey of uint16 without a channel or with one.

    Raises:
        UserError: another shape or dtype, or no pixel.
    """
    import numpy as np
    from PIL import Image

    pixels = np.asarray(pixels)
    plane = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    grey = plane.ndim == 2
    if not plane.size or not (grey or (plane.ndim == 3 and plane.shape[2] in (3, 4))):
        shape = " × ".join(map(str, pixels.shape)) or "a single number"
        raise UserError(f"{where}: pixels of the shape {shape}; expected height × width, or height × width × 1, 3 or 4")
    if plane.dtype == np.uint16 and grey:
        plane = _eight_bits(plane)
    if plane.dtype != np.uint8:
        raise UserError(f"{where}: pixels of the type {plane.dtype}; expected uint8 (0 … 255), or uint16 for grey")
    return _rgb(Image.fromarray(np.ascontiguousarray(plane)), where)


def is_image_name(name: str) -> bool:
    """Does a file's name end as an image's, and is it no hidden file?"""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


@contextlib.contextmanager
def _quietly():
    """Too many pixels are an error, damaged metadata says nothing; one thread at a time, because filters are the process's."""
    from PIL import Image

    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _bytes_of(path: str | os.PathLike, name: str) -> bytes:
    """The bytes of a file."""
    try:
        if os.path.isdir(path):
            raise UserError(f"{name}: a folder, expected an image file")
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{name}: a device, expected an image file")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{name}: no such image file; mend the path or remove the item") from None
    except OSError as error:
        raise UserError(f"{name}: the image cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # a path with a zero byte, or half a letter
        raise UserError(f"{name!r}: no path of an image file ({error})") from None


def _refuse_pages(image, name: str) -> None:
    """Raise for a file whose further frames are pictures of their own."""
    frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if frames > 1:
        raise UserError(f"{name}: a TIFF of {frames} pages, of which none is the image; write the one that counts to a file")


def upright(image: Image.Image) -> Image.Image:
    """The picture as its camera was held; metadata that nobody can read turns nothing."""
    from PIL import ImageOps

    try:
        with _quietly():
            return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, OSError, TypeError, KeyError, struct.error):
        return image


def _rgb(image, name: str):
    """The image in RGB, whatever its mode."""
    from PIL import Image

    if image.mode in ("I", "F"):
        what = "32-bit numbers" if image.mode == "I" else "floating-point numbers"
        raise UserError(f"{name}: pixels are {what}, of which none is white; write the range that counts as 8- or 16-bit grey")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_eight_bits(image):
    """A grey image of 16 bits in 8, with what EXIF says of it."""
    import numpy as np
    from PIL import Image

    exif, small = image.getexif(), Image.fromarray(_eight_bits(np.asarray(image)))
    if orientation := exif.get(0x0112):
        small.getexif()[0x0112] = orientation
    return small


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """0 … 65,535 as 0 … 255, rounded."""
    return ((values.astype("uint32") + 128) // 257).astype("uint8")
