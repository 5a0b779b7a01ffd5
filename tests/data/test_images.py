"""Single images: modes, EXIF, and what cannot be read, each as a real file."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from doratune.data.images import SUFFIXES, image_of_array, is_image_name, open_image
from doratune.errors import UserError


def quarters(mode="RGB"):
    """8 × 12: the left half dark, the right half light, the upper left quarter red in RGB."""
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 6:] = 200
    pixels[:4, :6] = (250, 10, 10)
    return Image.fromarray(pixels).convert(mode)


def written(folder, image, name="x.png", **options):
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *[(mode, f"x.{kind}") for mode in ("1", "L", "P", "RGB", "RGBA", "LA") for kind in ("png", "tiff")],
        *[("RGB", f"x.{kind}") for kind in ("bmp", "gif", "webp", "ppm", "jpg")],
        ("L", "x.jpg"),
        ("CMYK", "x.jpg"),
        ("CMYK", "x.tiff"),
        ("YCbCr", "x.jpg"),
        ("RGBA", "x.webp"),
    ],
)
def test_every_mode_is_rgb_of_the_same_picture(mode, name, tmp_path):
    image = quarters(mode)
    options = {"quality": 100, "subsampling": 0} if name.endswith("jpg") else {"lossless": True} if name.endswith("webp") else {}
    read = open_image(written(tmp_path, image, name, **options))
    assert read.mode == "RGB" and read.size == (12, 8)
    expected = np.asarray(image.convert("RGB"), int)
    assert np.abs(np.asarray(read, int) - expected).max() <= (12 if name.endswith(("jpg", "gif")) else 0)


def test_bytes_are_read_as_a_file_is(tmp_path):
    path = written(tmp_path, quarters())
    assert np.array_equal(open_image(path.read_bytes()), open_image(path))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_stands_upright(orientation, tmp_path):
    """All eight ways of holding a camera; the file keeps its pixels, EXIF alone says how they lie."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = quarters()
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("x.png", "x.tiff"):
        read = open_image(written(tmp_path, stored, name, exif=exif))
        assert np.array_equal(read, upright), name


def test_metadata_that_cannot_be_read_turns_nothing(tmp_path):
    path = written(tmp_path, quarters(), "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 20, quality=100)
    assert open_image(path).size == (12, 8)


def test_what_is_transparent_is_white_whatever_lies_under_it(tmp_path):
    pixels = np.full((4, 4, 4), (255, 0, 0, 255), np.uint8)
    pixels[:, 2:] = (0, 255, 0, 0)
    pixels[0, 0, 3] = 128
    rgba = Image.fromarray(pixels)
    palette = rgba.convert("P")
    palette.info["transparency"] = palette.getpixel((3, 3))
    grey = Image.fromarray(np.full((4, 4), 7, np.uint8))
    for path in (written(tmp_path, rgba, "a.png"), written(tmp_path, rgba, "a.webp", lossless=True)):
        read = np.asarray(open_image(path), int)
        assert (read[:, 2:] == 255).all() and tuple(read[1, 0]) == (255, 0, 0)
        assert np.abs(read[0, 0] - (255, 127, 127)).max() <= 1
    keyed = written(tmp_path, grey, "key.png", transparency=7)
    assert (np.asarray(open_image(keyed)) == 255).all()
    indexed = open_image(written(tmp_path, palette, "p.png", transparency=palette.getpixel((3, 3))))
    assert np.asarray(indexed)[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.pgm"])
def test_sixteen_bits_use_the_whole_range(name, tmp_path):
    """Pillow's own conversion clips them: a radiograph would be white."""
    values = np.array([[0, 257, 32768, 65535]] * 2, np.uint16)
    read = np.asarray(open_image(written(tmp_path, Image.fromarray(values), name)))
    assert read[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.array_equal(image_of_array(values), read)
    if name != "x.pgm":
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = written(tmp_path, Image.fromarray(np.ascontiguousarray(np.rot90(values))), f"turned_{name}", exif=exif)
        assert np.array_equal(open_image(turned), read)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_white_are_refused(dtype, tmp_path):
    path = written(tmp_path, Image.fromarray(np.array([[0, 5], [1000, 70000]], dtype)), "x.tiff")
    with pytest.raises(UserError, match=r"x.tiff: pixels are .* write the range that counts as 8- or 16-bit grey"):
        open_image(path)


def test_an_animation_is_its_first_frame_and_pages_are_refused(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("x.gif", "x.webp", "x.png"):
        path = written(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        assert np.asarray(open_image(path))[0, 0].tolist()[0] > 200
    path = written(tmp_path, frames[0], "x.tiff", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="a TIFF of 2 pages"):
        open_image(path)


def bad_files(folder):
    """(file, what is said of it)."""
    whole = written(folder, Image.effect_noise((64, 64), 50).convert("RGB"), "whole.jpg").read_bytes()
    png = written(folder, quarters(), "whole.png").read_bytes()
    contents = {
        "empty.png": (b"", "an empty file"),
        "text.jpg": (b"hello, I am no image at all", "no JPEG, PNG, .* image; convert or remove it"),
        "cut.jpg": (whole[: len(whole) // 2], "a truncated or damaged image"),
        "cut.png": (png[: len(png) // 2], "a truncated or damaged image"),
        "head.png": (png[:20], "(truncated or damaged|no JPEG)"),
        "sum.png": (png[:45] + bytes([png[45] ^ 255]) + png[46:], "a truncated or damaged image"),
        "scan.dcm": (bytes(128) + b"DICM" + bytes(40), "DICOM, which is no JPEG.*as PNG first"),
        "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "no JPEG"),
        "huge.png": (_png_of(20_000, 20_000), "more than 89,478,485 pixels"),
        "large.png": (_png_of(10_000, 9_500), "more than 89,478,485 pixels"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {folder / name: words for name, (_, words) in contents.items()}


def _png_of(width, height):
    """A PNG that says a size and holds no pixel."""
    small = io.BytesIO()
    Image.new("RGB", (1, 1)).save(small, "png")
    data = bytearray(small.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def test_what_cannot_be_read_is_one_line_with_item_and_path(tmp_path):
    bad = bad_files(tmp_path) | {
        tmp_path / "none.png": "no such image file",
        tmp_path: "a folder, expected an image file",
        tmp_path / "whole.png" / "x.png": "the image cannot be read",
        tmp_path / ("x" * 300): "the image cannot be read",
        str(tmp_path / "a\0b.png"): "no path of an image file",
    }
    for path, words in bad.items():
        with pytest.raises(UserError, match=words) as raised:
            open_image(path, "train.json: item 3")
        message = str(raised.value)
        assert "\n" not in message and message.lstrip("'").startswith("train.json: item 3: "), message
        assert str(path) in message or "\0" in str(path)


def test_damage_anywhere_is_a_user_error_or_a_picture(tmp_path):
    """Bytes changed and files cut at random, in every format: no other exception, no picture that is not RGB."""
    generator = random.Random(0)
    for name in ("x.png", "x.jpg", "x.gif", "x.webp", "x.tiff", "x.bmp", "x.ppm"):
        whole = written(tmp_path, quarters(), name).read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(generator.randrange(1, 6)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            data = bytes(data[: generator.randrange(1, len(data) + 1)] if generator.random() < 0.5 else data)
            assert outcome(data) in ("RGB", "one line")


def outcome(data):
    try:
        return open_image(data, "x").mode
    except UserError as error:
        return "one line" if "\n" not in str(error) else str(error)


def test_arrays_are_pictures():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(np.asarray(image_of_array(grey))[..., 1], grey)
    assert np.array_equal(image_of_array(grey[..., None]), image_of_array(grey))
    rgb = np.dstack([grey, grey + 1, grey + 2])
    assert np.array_equal(image_of_array(rgb), rgb)
    clear = np.dstack([rgb, np.zeros_like(grey)])
    assert (np.asarray(image_of_array(clear)) == 255).all()
    wrong = (grey.astype(float), rgb.astype(np.uint16), grey[None, None], grey[0], rgb[:0], np.zeros((2, 2, 2), np.uint8))
    for pixels in wrong:
        with pytest.raises(UserError, match=r"images.npz: item 4: pixels of the (type|shape)"):
            image_of_array(pixels, "images.npz: item 4")


def test_names_of_images():
    assert all(is_image_name(f"a{suffix}") and is_image_name(f"a{suffix.upper()}") for suffix in SUFFIXES)
    assert not any(map(is_image_name, ("a.txt", "._a.png", ".png", "png", "a.png.json")))
