"""Images with masks from folders and tables; what a mask's numbers are in every kind of file; each problem is one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from doratune.data.encode import IGNORED
from doratune.data.image_sets import usable
from doratune.data.mask_sets import load_masked
from doratune.data.masks import MaskedImage, names_of_classes
from doratune.errors import UserError

NUMBERS = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)


def pair(folder, name="0", numbers=NUMBERS, images="images", masks="masks", ending="jpg"):
    for part in (images, masks):
        (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", numbers.shape[::-1], (9, 9, 9)).save(folder / images / f"{name}.{ending}")
    Image.fromarray(numbers).save(folder / masks / f"{name}.png")


def failed(call, *arguments, **options):
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_folders_in_pairs_and_their_splits(tmp_path):
    for name in ("a", "b", "deep/a"):
        pair(tmp_path / "plain", name)
    Image.fromarray(NUMBERS).save(tmp_path / "plain" / "masks" / "alone.png")
    plain = load_masked(str(tmp_path / "plain"))
    assert [item.name.rpartition("images/")[2] for item in plain.items] == ["a.jpg", "b.jpg", "deep/a.jpg"]
    assert ["alone.png" in note for note in plain.notes] == [True]
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        for i in range(count):
            pair(tmp_path / "inner" / split, str(i))
            pair(tmp_path / "outer", str(i), images=f"images/{split}", masks=f"annotations/{split}")
    for folder in ("inner", "outer"):
        sizes = [len(load_masked(str(tmp_path / folder), use=use).items) for use in ("train", "val", "test")]
        assert sizes == [3, 2, 1] and len(load_masked(f"{tmp_path / folder}:train[:2]", use="test").items) == 2
    assert "has no folders for splits" in failed(load_masked, f"{tmp_path / 'plain'}:test")


def test_tables_of_paths_and_of_bytes(tmp_path):
    from datasets import Dataset

    for i in range(3):
        pair(tmp_path, str(i))
    rows = [f"images/{i}.jpg,masks/{i}.png,{split}" for i, split in enumerate(("train", "train", "test"))]
    (tmp_path / "a.csv").write_text("\n".join(["file_name,mask,split", *rows]))
    assert [len(load_masked(str(tmp_path / "a.csv"), use=use).items) for use in ("train", "test")] == [2, 1]
    (tmp_path / "b.jsonl").write_text(json.dumps({"photo": "images/0.jpg", "seg": "masks/0.png"}))
    chosen = load_masked(str(tmp_path / "b.jsonl"), columns={"image": "photo", "mask": "seg"})
    assert (chosen.items[0].open()[1] == np.where(NUMBERS == 255, IGNORED, NUMBERS.astype(int))).all()
    assert "has no column 'mask'" in failed(load_masked, str(tmp_path / "b.jsonl"), columns={"image": "photo"})
    assert "columns names 'label'; a table of images has image, mask, split" in failed(
        load_masked, str(tmp_path / "a.csv"), columns={"label": "x"}
    )
    files = [(tmp_path / place).read_bytes() for place in ("images/0.jpg", "masks/0.png")]
    Dataset.from_list([{key: {"bytes": data, "path": None} for key, data in zip(("image", "annotation"), files)}]).to_parquet(
        tmp_path / "c.parquet"
    )
    assert load_masked(str(tmp_path / "c.parquet")).items[0].open()[0].size == (3, 2)


@pytest.mark.parametrize("kind", ["grey", "palette", "sixteen bits", "tiff", "one bit", "turned"])
def test_numbers_come_out_as_they_were_written(kind, tmp_path):
    numbers = NUMBERS.astype(np.uint16)
    if kind == "sixteen bits":
        numbers = np.where(numbers == 255, 65_535, numbers * 300).astype(np.uint16)
        Image.fromarray(numbers).save(tmp_path / "m.png")
    elif kind == "palette":
        image = Image.fromarray(NUMBERS, "P")
        image.putpalette([c for i in range(256) for c in (255 - i, i, 7)])
        image.save(tmp_path / "m.png", transparency=0)
    elif kind == "one bit":
        numbers = np.array([[0, 1, 1], [1, 0, 1]])
        Image.fromarray(numbers.astype(bool)).save(tmp_path / "m.png")
    elif kind == "turned":  # as its camera was held, like the image
        exif = Image.Exif()
        exif[0x0112] = 3
        Image.fromarray(NUMBERS[::-1, ::-1].copy()).save(tmp_path / "m.png", exif=exif)
    else:
        Image.fromarray(NUMBERS).save(tmp_path / ("m.tiff" if kind == "tiff" else "m.png"))
    mask = next(tmp_path.glob("m.*"))
    Image.new("RGB", (3, 2)).save(tmp_path / "i.png")
    read = MaskedImage("i", tmp_path / "i.png", mask).open()[1]
    assert (read == np.where(np.isin(numbers, (255, 65_535)), IGNORED, numbers.astype(int))).all()


def test_what_is_no_pair_is_one_line_with_its_place(tmp_path):
    pair(tmp_path, "good")
    images, masks = tmp_path / "images", tmp_path / "masks"
    grey = Image.fromarray(NUMBERS)
    Image.new("RGB", (3, 2)).save(images / "x.png")

    def line(mask):
        """What is said of x.png with this mask: an image, or the bytes of a file."""
        (masks / "x.png").unlink(missing_ok=True)
        if isinstance(mask, bytes):
            (masks / "x.png").write_bytes(mask)
        elif mask is not None:
            mask.save(masks / "x.png")
        unusable = []
        items = [replace(item, classes=3) for item in load_masked(str(tmp_path), unusable=unusable).items]
        assert len(usable(items, unusable)) == 1  # the good one stays
        (said,) = unusable
        return said

    assert line(None) == f"{images}/x.png: no mask {masks}/x.png; write it, or remove the image"
    assert "x.png: the mask is 2 × 2 and the image 3 × 2; write the mask at the image's size" in line(grey.crop((0, 0, 2, 2)))
    many = line(Image.fromarray(np.where(NUMBERS == 2, 7, NUMBERS).astype(np.uint8)))
    assert f"{images}/x.png: the mask {masks}/x.png holds the class number 7, and the model has 3 classes, 0 to 2" in many
    raised = line(Image.fromarray(np.where(NUMBERS == 255, 255, NUMBERS + 1).astype(np.uint8)))
    assert "the class number 3" in raised and "set reduce_labels: true if 1 is the first class" in raised
    for mode in ("RGB", "RGBA", "LA"):
        assert f"a mask of colours ({mode}), which name no class; write each pixel's class number" in line(grey.convert(mode))
    assert "no pixel of the mask" in line(Image.new("L", (3, 2), 255))
    grey.save(tmp_path / "y.jpg")
    assert "a mask in JPEG, which does not keep class numbers" in line((tmp_path / "y.jpg").read_bytes())
    assert "an empty file" in line(b"") and "no JPEG, PNG" in line(b"GIF?")
    assert "truncated or damaged" in line((masks / "good.png").read_bytes()[:45])
    (masks / "x.png").rename(masks / "x.tif")
    grey.save(masks / "x.png")
    assert "x.png and x.tif have one name; rename one" in failed(load_masked, str(tmp_path))


def test_what_is_no_source_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert "holds no folder; expected" in failed(load_masked, str(tmp_path / "empty"))
    assert "holds no images; put them there" in failed(load_masked, str(tmp_path))
    assert "no such images; give a folder with images/ and masks/" in failed(load_masked, str(tmp_path / "nothing"))
    assert "no layout of images with masks has such a file" in failed(load_masked, str(tmp_path / "notes.txt"))


def test_names_of_classes(tmp_path):
    (tmp_path / "n.txt").write_text("ground\nsky\n\nsun\n")
    (tmp_path / "n.json").write_text(json.dumps({"id2label": {"1": "sky", "0": "ground"}}))
    assert names_of_classes(str(tmp_path / "n.txt")) == ["ground", "sky", "sun"]
    assert names_of_classes(str(tmp_path / "n.json")) == ["ground", "sky"] and names_of_classes("") is None
    (tmp_path / "bad.json").write_text(json.dumps({"0": "ground", "2": "sky"}))
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\x00")
    for said, why in (
        (str(tmp_path / "none.txt"), "which is no file; give a list of names"),
        (str(tmp_path / "bad.json"), "is no id2label; expected"),
        (str(tmp_path / "odd.txt"), "is no text in UTF-8"),
        (["sky"], "holds 1 names; segmentation needs two classes"),
        (["sky", "sun", "sky"], "holds 'sky' twice"),
    ):
        assert why in failed(names_of_classes, said)
