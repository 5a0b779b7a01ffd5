"""`doratune evaluate` of image classifiers: figures and files, and what is refused."""

import json

import numpy as np
import pytest
import torch
from image_models import COLOURS, image_model, photographs
from PIL import Image
from transformers import ViTForImageClassification

from doratune.cli.main import main
from doratune.training.class_scores import class_scores

NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder of a ViT that tells the three colours, most of the time: its head was never trained."""
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    folder = image_model("vit", tmp_path_factory.mktemp("models") / "vit", **labels)
    model = ViTForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    model.save_pretrained(folder)
    return folder


def evaluate(classifier, task, output, **settings):
    usual = {"model": classifier, "task": task, "output": output}
    return main(["evaluate", *(f"--{name}={value}" for name, value in (usual | settings).items())])


def test_figures_are_those_of_the_records(classifier, tmp_path):
    photos = photographs(tmp_path / "photos", 5)
    assert evaluate(classifier, photos, tmp_path / "e", batch_size=4) == 0
    result = json.loads((tmp_path / "e" / "results.json").read_text())["results"][0]
    records = [json.loads(line) for line in (tmp_path / "e" / "photos.likelihood.jsonl").read_text().splitlines()]
    probabilities = np.array([[r["probabilities"][name] for name in NAMES] for r in records])
    figures = class_scores(np.array([NAMES.index(r["gold"]) for r in records]), probabilities)
    for name, value in figures.items():
        assert result[name] == pytest.approx(value, abs=1e-5)
    assert probabilities.sum(1) == pytest.approx(np.ones(15), abs=1e-5)
    assert [r["answer"] for r in records] == [NAMES[i] for i in probabilities.argmax(1)]
    assert (result["total"], result["chance"], result["majority"]) == (15, 1 / 3, 1 / 3)
    assert records[0]["prompt"] == str(photos / "blue" / "0.png")


def test_a_task_is_the_test_split_and_limits_are_held(classifier, tmp_path):
    photographs(tmp_path / "photos" / "train", 3)
    photographs(tmp_path / "photos" / "test", 2)
    assert evaluate(classifier, f"[{tmp_path}/photos, {tmp_path}/photos:train]", tmp_path / "e") == 0
    results = json.loads((tmp_path / "e" / "results.json").read_text())["results"]
    assert [(r["task"], r["total"]) for r in results] == [("photos", 6), ("photos-train", 9)]
    photographs(tmp_path / "a:b" / "scans", 1)  # no split: a folder's own name
    assert evaluate(classifier, tmp_path / "a:b" / "scans", tmp_path / "c") == 0
    assert (tmp_path / "c" / "scans.likelihood.jsonl").is_file()
    assert evaluate(classifier, f"{tmp_path}/photos", tmp_path / "l", limit=4) == 0
    assert json.loads((tmp_path / "l" / "results.json").read_text())["results"][0]["total"] == 4


def test_what_cannot_be_scored_is_one_line(classifier, tmp_path, capsys):
    photos = photographs(tmp_path / "photos", 2)
    other = photographs(tmp_path / "other", 2, {"bleu": (0, 0, 255)})
    spoiled = ViTForImageClassification.from_pretrained(classifier)
    with torch.no_grad():
        spoiled.classifier.weight[0, 0] = float("nan")
    spoiled.save_pretrained(tmp_path / "spoiled")
    for name in ("preprocessor_config.json",):
        (tmp_path / "spoiled" / name).write_bytes((classifier / name).read_bytes())
    body = image_model("vit", tmp_path / "body", body=True)
    for model, task, more, said in (
        (classifier, other, {}, "the label 'bleu' is none of the model's: blue, green, red; did you mean 'blue'?"),
        (classifier, photos, {"protocol": "generate"}, "a class of an image is not written; set protocol: likelihood"),
        (classifier, photos, {"beams": 2}, "beams is 2, which is for models that write"),
        (classifier, f"[{photos}, {photos}]", {}, "two tasks are called 'photos'"),
        (classifier, "boolq", {}, "boolq: no such images"),
        (tmp_path / "spoiled", photos, {}, "NaN or infinite values"),
        (body, photos, {}, "has no head that tells classes of images, and no adapter brings one; train it first"),
    ):
        assert evaluate(model, task, tmp_path / "e", **more) == 2, said
        lines = capsys.readouterr().err.strip().splitlines()
        assert said in lines[-1], (said, lines[-1])
        assert not (tmp_path / "e").exists()


def test_settings_of_images_are_refused_for_text(tiny_folder, tmp_path, capsys):
    task = tmp_path / "t.json"
    task.write_text(json.dumps([{"instruction": "x", "input": "", "output": "true", "answer": "true"}]))
    assert evaluate(tiny_folder, task, tmp_path / "e", bad_items="skip") == 2
    assert "bad_items is for labelled images" in capsys.readouterr().err


def test_any_kind_of_image_file_is_scored(classifier, tmp_path):
    """Grey, CMYK, transparent, turned, sixteen bits: all are one picture of one size to the model."""
    folder = tmp_path / "files" / "blue"
    folder.mkdir(parents=True)
    plain = Image.new("RGB", (30, 20), COLOURS["blue"])
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.save(folder / "a.png")
    plain.save(folder / "b.jpg", exif=exif, quality=100)
    plain.convert("CMYK").save(folder / "c.jpg", quality=100)
    plain.convert("RGBA").save(folder / "d.webp", lossless=True)
    plain.convert("P").save(folder / "e.gif")
    plain.convert("L").save(folder / "f.bmp")
    Image.fromarray(np.full((9, 7), 30000, np.uint16)).save(folder / "g.tiff")
    assert evaluate(classifier, tmp_path / "files", tmp_path / "e", batch_size=3) == 0
    records = [json.loads(line) for line in (tmp_path / "e" / "files.likelihood.jsonl").read_text().splitlines()]
    assert len(records) == 7
    colours = np.array([[r["probabilities"][name] for name in NAMES] for r in records])
    assert np.abs(colours[:5] - colours[0]).max() < 0.1
