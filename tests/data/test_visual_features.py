"""Features of images and video: what a tower makes of them, and a file of them that is whole or not there."""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from image_models import SIDE, image_model
from PIL import Image
from safetensors.torch import load_file

from doratune.data.visual_features.extract import features_of
from doratune.data.visual_features.pictures import pictures_of
from doratune.data.visual_features.settings import FeatureSettings
from doratune.data.visual_features.store import FeatureFile
from doratune.data.visual_tasks import Sight, VisualItem
from doratune.errors import UserError
from doratune.support.image_towers import ImageTower


def clip(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = sizes | {"image_size": SIDE, "patch_size": 4}, sizes | {"vocab_size": 50, "max_position_embeddings": 16}
    transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)).save_pretrained(
        folder
    )
    crop = {"height": SIDE, "width": SIDE}
    transformers.ViTImageProcessorPil(size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    kinds = {kind: image_model(kind, folder / kind, body=True) for kind in ("vit", "swin", "convnext", "resnet")}
    return {kind: str(path) for kind, path in (kinds | {"clip": clip(folder / "clip")}).items()}


@pytest.fixture(scope="module")
def tower(towers):
    return ImageTower(towers["vit"])


def picture(seed, size=(20, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8))


def item(path, n=1, video=False, span=None):
    return VisualItem("vqa", str(n), (Sight(str(path), video, span),), "What?", ("yes",), f"data: item {n}")


def items_of(folder, count=5):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        picture(n).save(folder / f"{n}.png")
    return [item(folder / f"{n}.png", n) for n in range(count)]


@pytest.mark.parametrize(("kind", "side"), [("vit", 4), ("clip", 4), ("swin", 4), ("convnext", 2), ("resnet", 2)])
def test_any_tower_makes_a_grid_and_a_whole(kind, side, towers):
    """As many cells as asked for and there are; a batch is as one by one; both kinds of one size."""
    tower, shown = ImageTower(towers[kind]), [picture(0), picture(1, (30, 18))]
    grid, whole = tower.grid(shown, 1000), tower.whole(shown)
    assert grid.shape[1] == side * side and grid.shape[2] == whole.shape[1] and not torch.equal(grid[0], grid[1])
    assert torch.allclose(grid[1:], tower.grid(shown[1:], 1000), atol=1e-5)
    four = tower.grid(shown, 4)
    assert four.shape[1] == 4 and torch.allclose(four.amax(1), grid.amax(1), atol=1e-6)  # the strongest of each region


def test_cells_are_where_they_are_in_the_picture(towers):
    """Of a picture with one bright corner, that corner's cell is the one that differs; class tokens are left out."""
    plain = Image.new("RGB", (SIDE, SIDE))
    bright = plain.copy()
    bright.paste((255, 255, 255), (SIDE - 4, 0, SIDE, 4))
    grid = ImageTower(towers["convnext"]).grid([plain, bright], 4)
    assert int((grid[1] - grid[0]).abs().sum(-1).argmax()) == 1  # the upper right
    model = transformers.ViTModel.from_pretrained(towers["vit"])
    pixels = ImageTower(towers["vit"]).processor([plain], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model(pixels).last_hidden_state[:, 1:]
    assert torch.allclose(ImageTower(towers["vit"]).grid([plain], 16), states, atol=1e-5)


def test_a_file_of_features(tower, tmp_path):
    """An ordinary safetensors file; made once; other settings and another tower are other files."""
    items, settings = items_of(tmp_path / "a"), FeatureSettings(features=str(tmp_path / "features"), cells=9)
    made = features_of(items, "vqa train", tower, settings)
    assert made.file.path.name.startswith("vqa-train-") and made.file.count == 5
    for n, one in enumerate(items):
        assert torch.allclose(made[one.sights[0]], tower.grid([picture(n)], 9)[0], atol=2e-3)
    assert load_file(made.file.path)["features"].shape == (5, 9, 32)
    written = made.file.path.stat().st_mtime_ns
    again = features_of(items, "vqa train", tower, settings)
    assert again.file.path.stat().st_mtime_ns == written and list((tmp_path / "features").iterdir()) == [made.file.path]
    other = features_of(items, "vqa train", tower, FeatureSettings(features=settings.features, cells=4))
    assert other.file.path != made.file.path and other[items[0].sights[0]].shape == (4, 32)


def test_images_of_the_same_names_are_not_the_same(tower, tmp_path):
    """Neither in another folder, nor at the same place later."""
    items, settings = items_of(tmp_path / "a"), FeatureSettings(features=str(tmp_path / "features"))
    others = [item(tmp_path / "b" / f"{n}.png", n) for n in range(5)]
    (tmp_path / "b").mkdir()
    for n in range(5):
        picture(n + 50).save(tmp_path / "b" / f"{n}.png")
    made, other = features_of(items, "x", tower, settings), features_of(others, "x", tower, settings)
    assert made.file.path != other.file.path
    assert not torch.allclose(made[items[0].sights[0]], other[others[0].sights[0]])
    later = made.file.path.stat().st_mtime + 5
    os.utime(tmp_path / "a" / "3.png", (later, later))
    with pytest.raises(UserError, match=r"3\.png was changed after .* was made; remove that file, it is made again"):
        features_of(items, "x", tower, settings)


def test_extraction_goes_on_where_it_was_stopped(tower, tmp_path):
    """What was made stays, is no file of features, and the whole file is byte for byte that of one go."""
    items = items_of(tmp_path / "a", 40)
    bad = tmp_path / "a" / "33.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:60])
    settings = FeatureSettings(features=str(tmp_path / "features"), cells=4)
    with pytest.raises(UserError, match=r"data: item 33: .*33\.png: a truncated or damaged image"):
        features_of(items, "x", tower, settings)
    partial = next((tmp_path / "features").iterdir())
    assert partial.suffix == ".partial"
    with pytest.raises(UserError, match="damaged"):
        FeatureFile(partial)
    bad.write_bytes(whole)
    row = 2 * 4 * 32
    begun = partial.read_bytes()
    later = partial.stat().st_mtime + 5
    picture(77).save(tmp_path / "a" / "20.png")  # changed meanwhile: what was made of it and behind it does not count
    os.utime(tmp_path / "a" / "20.png", (later, later))
    assert (len(begun) - len(begun) % 8) // row >= 32
    with open(partial, "r+b") as file:  # killed within a row
        file.truncate(len(begun) - row // 2)
    done = features_of(items, "x", tower, settings)
    fresh = features_of(items, "x", tower, FeatureSettings(features=str(tmp_path / "other"), cells=4))
    assert done.file.path.read_bytes() == fresh.file.path.read_bytes()
    assert not list((tmp_path / "features").glob("*.partial"))


def test_what_cannot_be_read_is_skipped_where_that_is_wanted(tower, tmp_path):
    items = items_of(tmp_path / "a")
    (tmp_path / "a" / "1.png").write_text("no image")
    (tmp_path / "a" / "3.png").unlink()
    pair = VisualItem("nlvr", "p", (items[0].sights[0], items[3].sights[0]), "Same.", ("true",), "data: pair")
    settings = FeatureSettings(features=str(tmp_path / "features"))
    made, unusable = features_of([*items, pair], "x", tower, settings, skip=True), []
    assert [one.name for one in made.usable([*items, pair], unusable)] == ["0", "2", "4"]
    assert len(unusable) == 3 and "no such image file" in unusable[1] and unusable[2].startswith("data: pair: ")
    again, unusable = features_of([*items, pair], "x", tower, settings, skip=True), []
    assert len(again.usable([*items, pair], unusable)) == 3 and "not readable when" in unusable[0]
    with pytest.raises(UserError, match="nothing could be read of it"):
        again[items[1].sights[0]]


def test_files_that_are_no_features(tower, tmp_path):
    made = features_of(items_of(tmp_path / "a"), "x", tower, FeatureSettings(features=str(tmp_path / "features")))
    data = made.file.path.read_bytes()
    foreign = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    foreign["__metadata__"]["format"] = "other"
    text = json.dumps(foreign).encode()
    for name, content, said in (
        ("cut", data[:-10], "is damaged: .* bytes, expected"),
        ("long", data + b"0", "is damaged"),
        ("empty", b"", "is no file of features, or a damaged one"),
        ("noise", b"\x00" * 200, "is no file of features"),
        ("foreign", len(text).to_bytes(8, "little") + text, "holds no features of doratune"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            FeatureFile(tmp_path / name)
    with pytest.raises(UserError, match="made by another image tower"):
        FeatureFile(made.file.path, "0" * 16)


def test_frames_of_a_folder(tmp_path):
    """In natural order, at equal distances, a part by the frames a second."""
    for n in range(12):
        Image.new("RGB", (4, 4), (10 * n, 0, 0)).save(tmp_path / f"frame_{n}.png")
    (tmp_path / "notes.txt").write_text("not a frame")

    def reds(frames, span=None, rate=2.0):
        return [p.getpixel((0, 0))[0] // 10 for p in pictures_of(Sight(str(tmp_path), True, span), frames, rate)]

    assert reds(100) == list(range(12)) and reds(4) == [1, 4, 7, 10] and reds(1) == [6]
    assert reds(100, (1, 2.5)) == [2, 3, 4]
    with pytest.raises(UserError, match="no frame between 7 and 9 s: 12 frames are 6 s at 2 a second; set frame_rate"):
        reds(4, (7, 9))


def film(path, frames=10, rate=5):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 4_000_000
        for n in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (25 * n, 0, 0)))
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_frames_of_a_video_file(tmp_path):
    path = film(tmp_path / "a.mp4")

    def reds(frames, span=None):
        return [round(p.getpixel((9, 9))[0] / 25) for p in pictures_of(Sight(str(path), True, span), frames, 1.0)]

    assert reds(100) == list(range(10)) and reds(2) == [2, 7] and reds(100, (0.4, 1)) == [2, 3, 4]


def test_videos_that_cannot_be_read(tower, tmp_path):
    whole = film(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_text("no image")
    settings = FeatureSettings(features=str(tmp_path / "features"))
    for name, span, said in (
        ("cut.mp4", None, "no video stream in it: another kind of file, or a truncated one"),
        ("text.mp4", None, "no video that can be read"),
        ("empty.mp4", None, "an empty file"),
        ("nowhere.mp4", None, "no such video, neither a file nor a folder of frames"),
        ("folder", None, "a folder without an image, so a video without frames"),
        ("broken", None, r"1\.png: DICOM|1\.png: no JPEG"),
        ("whole.mp4", (50, 60), "no frame between 50 and 60 s; the video has 1.8 s"),
    ):
        with pytest.raises(UserError, match=f"data: item 1: .*(?:{said})"):
            features_of([item(tmp_path / name, video=True, span=span)], "x", tower, settings)


def test_images_and_videos_in_one_file(tower, tmp_path):
    """Each has its own number of rows; a part of a video is a row of its own."""
    items = items_of(tmp_path / "a", 3)
    film(tmp_path / "a" / "v.mp4")
    videos = [item(tmp_path / "a" / "v.mp4", 7, True), item(tmp_path / "a" / "v.mp4", 8, True, (0, 0.5))]
    made = features_of([*items, *videos], "x", tower, FeatureSettings(features=str(tmp_path / "f"), cells=4, frames=6))
    assert [len(made[one.sights[0]]) for one in [*items, *videos]] == [4, 4, 4, 6, 3]
