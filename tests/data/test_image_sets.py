"""Labelled images from folders by class, tables and .npz files; each problem is one line with its place."""

import json

import numpy as np
import pytest
from PIL import Image

from doratune.data.image_sets import load_images, of_learnable_classes, usable
from doratune.errors import UserError

COLOURS = {"blue": (10, 20, 230), "red": (230, 20, 10)}


def picture(path, colour=(1, 2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """photos/blue/0.png … and photos/red/deep/0.png …, three each."""
    for label, colour in COLOURS.items():
        for i in range(3):
            picture(tmp_path / "photos" / label / ("deep" if label == "red" else ".") / f"{i}.png", colour)
    return tmp_path / "photos"


def arrays(path, count=6, splits=("train", "val", "test"), **changed):
    generator = np.random.default_rng(0)
    held = {}
    for number, split in enumerate(splits):
        held[f"{split}_images"] = generator.integers(0, 255, (count, 8, 8, 3), np.uint8)
        held[f"{split}_labels"] = (np.arange(count) % 2 + 10 * (number == 2))[:, None].astype(np.uint8)
    np.savez_compressed(path, **held | changed)
    return path


def failed(call, *arguments, **options):
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_folder_by_class(photos):
    (photos / "red" / "notes.txt").write_text("x")
    (photos / "red" / "Thumbs.db").write_text("x")
    (photos / ".hidden").mkdir()
    picture(photos / "loose.png")
    images = load_images(str(photos))
    assert images.classes == ["blue", "red"] and images.counts() == {"blue": 3, "red": 3}
    assert images.items[0].open().getpixel((0, 0)) == COLOURS["blue"]
    assert images.items[0].name == str(photos / "blue" / "0.png")
    assert [note.partition(": ")[2][:9] for note in images.notes] == ["1 files a", "1 images "]
    assert len(load_images(f"{photos}[:2]").items) == 2


def test_a_folder_with_splits(photos, tmp_path):
    whole = tmp_path / "whole"
    for name in ("train", "validation", "test"):
        for label in COLOURS:
            for i in range(2 if name == "train" else 1):
                picture(whole / name / label / f"{i}.jpg")
    assert len(load_images(str(whole)).items) == 4
    assert len(load_images(str(whole), use="val").items) == 2
    assert load_images(f"{whole}:valid").items[0].name.endswith("validation/blue/0.jpg")
    assert len(load_images(f"{whole}:train[:3]", use="test").items) == 3
    assert "has no folders for splits" in failed(load_images, f"{photos}:test")
    (whole / "test").rename(tmp_path / "elsewhere")
    assert "has no images for test; it has train, val" in failed(load_images, str(whole), use="test")
    picture(tmp_path / "odd" / "test" / "0.png")  # a class that is called test
    picture(tmp_path / "odd" / "wait" / "0.png")
    assert load_images(str(tmp_path / "odd")).classes == ["test", "wait"]


def table(path, rows, names=("image", "label")):
    path.write_text("\n".join([",".join(names), *(",".join(row) for row in rows)]) + "\n")
    return str(path)


def test_tables_of_paths_and_labels(photos):
    rows = [(f"{label}/{'deep/' * (label == 'red')}{i}.png", label) for label in COLOURS for i in range(3)]
    plain = load_images(table(photos / "a.csv", rows))
    assert plain.counts() == {"blue": 3, "red": 3} and plain.items[5].open().getpixel((0, 0)) == COLOURS["red"]
    absolute = [(str(photos / name), label) for name, label in rows]
    assert load_images(table(photos.parent / "b.csv", absolute, ("File_Name", "diagnosis"))).counts() == plain.counts()
    named = table(photos / "c.csv", rows, ("scan", "finding"))
    assert load_images(named, columns={"image": "scan", "label": "finding"}).counts() == plain.counts()
    assert "has no column 'image'; it has 'scan', 'finding': say which" in failed(load_images, named)
    assert "image is 'scans', which" in failed(load_images, named, columns={"image": "scans"})
    assert "columns names 'path'" in failed(load_images, named, columns={"path": "scan"})
    both = table(photos / "d.csv", [(*row, "1") for row in rows], ("image", "path", "label"))
    assert "'image', 'path' may be the image" in failed(load_images, both)
    lines = [json.dumps({"path": name, "label": i % 12}) for i, (name, _) in enumerate(rows * 2)]
    (photos / "e.jsonl").write_text("\n".join(lines))
    assert load_images(str(photos / "e.jsonl")).classes == [str(i) for i in range(12)]  # by number, not 0, 1, 10, 11, 2


def test_splits_of_a_table(photos):
    rows = [(f"blue/{i}.png", "blue", split) for i, split in enumerate(("train", "Validation", "test"))]
    path = table(photos / "a.csv", rows, ("path", "class", "split"))
    assert [len(load_images(path, use=use).items) for use in ("train", "val", "test")] == [1, 1, 1]
    assert load_images(f"{path}:dev").items[0].name == "blue/1.png"
    path = table(photos / "b.csv", [(*row[:2], "fold7") for row in rows], ("path", "class", "split"))
    assert "b.csv: item 1 has the split 'fold7' under 'split'; expected train, val or test" in failed(load_images, path)


def test_images_inside_of_parquet(photos, tmp_path):
    from datasets import Dataset

    data = (photos / "red" / "deep" / "0.png").read_bytes()
    rows = [{"image": {"bytes": data, "path": "r.png"}, "label": 0}, {"image": {"bytes": data, "path": None}, "label": 1}]
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    images = load_images(str(tmp_path / "x.parquet"))
    assert [item.open().getpixel((0, 0)) for item in images.items] == [COLOURS["red"]] * 2
    assert [item.name for item in images.items] == ["r.png", f"{tmp_path}/x.parquet: item 2"]


def test_medmnist_files(tmp_path):
    path = arrays(tmp_path / "x.npz")
    images = load_images(str(path))
    assert images.classes == ["0", "1", "10", "11"] and images.counts() == {"0": 3, "1": 3, "10": 0, "11": 0}
    with np.load(path) as file:
        assert np.array_equal(images.items[2].open(), file["train_images"][2])
        assert np.array_equal(load_images(f"{path}:test").items[1].open(), file["test_images"][1])
    assert load_images(str(path), use="test").items[1].label == "11"
    grey = arrays(tmp_path / "grey.npz", train_images=np.arange(6 * 64, dtype=np.uint16).reshape(6, 8, 8) * 100)
    assert load_images(str(grey)).items[5].open().mode == "RGB"
    np.savez(tmp_path / "plain.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.array(["a", "b", "a"]))
    assert load_images(str(tmp_path / "plain.npz"), use="test").counts() == {"a": 2, "b": 1}
    assert "has no splits" in failed(load_images, f"{tmp_path / 'plain.npz'}:val")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"train_labels": np.zeros((6, 14), np.uint8)}, "train_labels is 6 × 14; one label an image"),
        ({"train_labels": np.zeros(5, np.uint8)}, "train_images holds 6, train_labels 5"),
        ({"train_labels": np.full(6, -1)}, "name no class"),
        ({"train_labels": np.zeros(6)}, "float64 that name no class"),
        ({"train_images": np.zeros((6, 8, 8, 8), np.uint8)}, "volumes are no images"),
        ({"train_images": np.zeros((6, 8), np.uint8)}, "6 × 8; expected images"),
        ({"train_images": np.zeros((6, 8, 8, 3), np.float32)}, "holds float32; expected uint8"),
        ({"train_labels": np.array([{}] * 6, object)}, "truncated or no .npz file of plain arrays"),
    ],
)
def test_arrays_that_are_no_labelled_images(changed, words, tmp_path):
    assert words in failed(load_images, str(arrays(tmp_path / "x.npz", **changed)))


def test_sources_that_hold_nothing_to_use(photos, tmp_path):
    whole = arrays(tmp_path / "x.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("hello")
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "x.doc").write_text("")
    picture(tmp_path / "flat" / "x.png")
    (tmp_path / "classes" / "a").mkdir(parents=True)
    said = {
        "cut.npz": "truncated or no .npz file",
        "text.npz": "truncated or no .npz file",
        "array.npz": "truncated or no .npz file",
        "other.npz": "holds 'weights'; expected train_images",
        "empty": "no images in folders of classes; expected",
        "classes": "no images in folders of classes; expected",
        "flat": "1 images, but no folder of a class",
        "empty.csv": "is empty",
        "x.doc": "no layout of labelled images has such a file",
        "nothing": "no such images; give a folder with a folder for each class",
        "x.npz:fold": "no such images",
    }
    for name, words in said.items():
        message = failed(load_images, str(tmp_path / name))
        assert words in message and str(tmp_path / name.partition(":")[0]) in message, name


def test_items_that_cannot_be_used_stop_or_are_counted(photos):
    rows = [("blue/0.png", "blue"), ("", "blue"), ("blue/1.png", ""), ("blue/none.png", "red"), ("blue/2.png", "red")]
    path = table(photos / "a.csv", rows)
    assert "a.csv: item 2 has no path of an image under 'image' (line 3)" in failed(load_images, path)
    unusable = []
    images = load_images(path, unusable=unusable)
    assert len(images.items) == 3 and len(unusable) == 2 and "item 3 has no label" in unusable[1]
    message = failed(usable, images.items)
    assert message.startswith(f"{path}: item 4: {photos}/blue/none.png: no such image file")
    assert len(usable(images.items, unusable)) == 2 and unusable[2] == message


def test_every_broken_file_is_counted_in_order(photos):
    broken = [photos / "blue" / "1.png", photos / "red" / "deep" / "0.png"]
    broken[0].write_bytes(broken[0].read_bytes()[:50])
    broken[1].write_bytes(b"")
    unusable, done = [], []
    there = usable(load_images(str(photos)).items, unusable, done.append)
    assert len(there) == 4 and sum(done) == 6
    assert [line.partition(": ")[0] for line in unusable] == [str(path) for path in broken]


def test_classes_of_one_image_or_none(photos):
    picture(photos / "rare" / "0.png")
    (photos / "bare").mkdir()
    images = load_images(str(photos))
    message = failed(of_learnable_classes, images)
    assert f"{photos}: class 'bare' has no images; give it two or more, remove it, or set bad_items: skip" == message
    unusable = []
    left = of_learnable_classes(images, unusable)
    assert left.classes == ["blue", "red"] and len(left.items) == 6
    assert len(unusable) == 2 and "class 'rare' has 1 image;" in unusable[1]
    one = load_images(table(photos / "one.csv", [("blue/0.png", "a"), ("blue/1.png", "a")]))
    assert "classification needs two classes or more" in failed(of_learnable_classes, one)
