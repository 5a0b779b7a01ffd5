"""Images, data and settings that cannot be trained on: one line with the place, or counted where the recipe says so."""

import json

import pytest
from image_models import image_model, photographs, words
from PIL import Image

from doratune.cli.main import main
from doratune.data.image_sets import LabelledImage
from doratune.support.image_models import load_processor
from doratune.training.image_rows import pixels_of


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: image_model(kind, folder / kind) for kind in ("vit", "resnet")}


def metrics_of(output):
    return json.loads((output / "metrics.json").read_text())


def test_images_of_any_size_are_taken_as_they_lie(bases, tmp_path):
    """Three rows of pixels are no channels: a guess would turn such an image."""
    processor = load_processor(str(bases["vit"]))
    for width, height in ((40, 3), (3, 40), (3, 3), (1, 1), (1, 50), (500, 2)):
        Image.new("RGB", (width, height), (255, 0, 0)).save(tmp_path / "x.png")
        pixels = pixels_of(LabelledImage("x", "red", tmp_path / "x.png"), processor)
        assert pixels.shape == (3, 16, 16) and (pixels[0] > 0.9).all() and (pixels[1:] < -0.9).all(), (width, height)


def spoiled(photos, tmp_path):
    """A copy of the photographs with a cut, an empty and a missing file."""
    folder = photographs(tmp_path / "spoiled", 6)
    (folder / "blue" / "1.png").write_bytes((folder / "blue" / "1.png").read_bytes()[:80])
    (folder / "red" / "2.png").write_bytes(b"")
    (folder / "green" / "3.png").unlink()
    (folder / "green" / "3.png").symlink_to(tmp_path / "nowhere.png")
    return folder


def test_broken_images_stop_the_run_or_are_counted(bases, photos, tmp_path, capsys):
    folder = spoiled(photos, tmp_path)
    assert main(words(bases["vit"], folder, tmp_path / "a")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"doratune train: {folder}/blue/1.png: a truncated or damaged image")
    assert not (tmp_path / "a").exists()
    assert main(words(bases["vit"], folder, tmp_path / "a", bad_items="skip", max_steps=1, tasks=folder)) == 0
    assert metrics_of(tmp_path / "a")["data"]["training"] == {"examples": 15, "unusable": 3}
    summary = json.loads((tmp_path / "a" / "scores" / "after" / "results.json").read_text())
    assert summary["results"][0]["total"] == 15 and len(summary["unusable"]) == 3
    options = ["evaluate", "--adapter", str(tmp_path / "a" / "adapter"), "--task", str(folder), "--output", str(tmp_path / "e")]
    assert main(options) == 2 and "1.png: a truncated" in capsys.readouterr().err
    assert main([*options, "--bad_items", "skip"]) == 0 and "3 unusable images skipped" in capsys.readouterr().out


def test_what_cannot_be_trained_is_one_line(bases, photos, tmp_path, capsys, tiny_folder):
    other = photographs(tmp_path / "other", 2, {"blue": (0, 0, 255), "orange": (255, 128, 0)})
    one = photographs(tmp_path / "one", 3, {"blue": (0, 0, 255)})
    rare = photographs(tmp_path / "rare", 2)
    (rare / "red" / "1.png").unlink()
    (tmp_path / "empty").mkdir()
    bare = image_model("vit", tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    large = image_model("vit", tmp_path / "large")
    settings = json.loads((large / "preprocessor_config.json").read_text()) | {"size": {"height": 24, "width": 24}}
    (large / "preprocessor_config.json").write_text(json.dumps(settings))
    vit = bases["vit"]
    for model, data, more, said in (
        (vit, photos, {"eval_data": other}, "the label 'orange' is none of the model's: blue, green, red"),
        (vit, photos, {"tasks": other}, "the label 'orange' is none of the model's"),
        (vit, one, {}, "classification needs two classes or more"),
        (vit, rare, {}, "class 'red' has 1 image; give it two or more, remove it, or set bad_items: skip"),
        (vit, tmp_path / "empty", {}, "no images in folders of classes; expected"),
        (vit, tmp_path / "nothing", {}, "no such images"),
        (vit, photos, {"eval_size": 36}, "eval_size is 36, but"),
        (vit, photos, {"packing": "true"}, "packing is True, which is for objective language_modeling"),
        (vit, photos, {"method": "prefix"}, "method prefix trains no head of classes"),
        (vit, photos, {"objective": "image_clasification"}, "did you mean 'image_classification'"),
        (bare, photos, {}, "has no preprocessor_config.json, which says how its images are prepared"),
        (large, photos, {}, "as its image processor prepares it, 3 × 24 × 24"),
        (tiny_folder, photos, {}, "of which there is no image classifier"),
        (tmp_path / "none", photos, {}, "no such model folder"),
        (bases["resnet"], photos, {"targets": "all-linear"}, "targets select no module after exclude and also_train"),
    ):
        assert main(words(model, data, tmp_path / "run", **more)) == 2, said
        lines = capsys.readouterr().err.strip().splitlines()
        assert said in lines[-1], (said, lines[-1])
        assert not (tmp_path / "run").exists()
