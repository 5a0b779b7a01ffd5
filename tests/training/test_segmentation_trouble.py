"""Whose classes a run of segmentation learns, what masks' numbers mean, and what cannot be trained on: one line, or counted."""

import json

import numpy as np
import pytest
from mask_models import NAMES, labels, mask_model, scene, scenes, words
from PIL import Image
from safetensors.torch import load_file

from doratune.cli.main import main


def test_whose_head_and_what_the_numbers_mean(tmp_path, capsys):
    """The model's own labels in order keep its head; other names, or none and no head, make a new one."""
    own = mask_model("segformer", tmp_path / "own", **labels(*NAMES))
    data = scenes(tmp_path / "data", 3)
    short = {"max_steps": 1, "batch_size": 3}
    assert main(words(own, data, tmp_path / "a", class_names="[]", **short)) == 0
    assert "3 classes (ground, sky, sun); the model's own head" in capsys.readouterr().out
    assert "decode_head.classifier.weight" not in str(load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors").keys())
    assert main(words(own, data, tmp_path / "b", class_names="[sky, ground, sun]", **short)) == 0
    assert "3 classes (sky, ground, sun); a new head" in capsys.readouterr().out
    for mask in (data / "masks").iterdir():  # as ADE20K's: 0 is of no class
        Image.fromarray(np.asarray(Image.open(mask)) + 1).save(mask)
    assert main(words(own, data, tmp_path / "d", **short)) == 2
    assert "set reduce_labels: true if 1 is the first class" in capsys.readouterr().err
    body = mask_model("segformer", tmp_path / "body", body=True)
    assert main(words(body, data, tmp_path / "d", reduce_labels="true", tasks=data, class_names="[]", **short)) == 0
    assert "3 classes (0, 1, 2); a new head" in capsys.readouterr().out
    told = json.loads((tmp_path / "d" / "scores" / "after" / "results.json").read_text())["results"][0]
    evaluate = ["evaluate", "--adapter", str(tmp_path / "d" / "adapter"), "--task", str(data), "--output", str(tmp_path / "e")]
    assert main(evaluate) == 0
    again = json.loads((tmp_path / "e" / "results.json").read_text())["results"][0]
    assert again["iou"] == pytest.approx(told["iou"], abs=0.01)
    assert main(["merge", "--adapter", str(tmp_path / "d" / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["reduce_labels"] is True


def test_what_cannot_be_trained_is_one_line_or_counted(tmp_path, capsys, tiny_folder):
    spoiled = scenes(tmp_path / "spoiled", 6)
    (spoiled / "masks" / "1.png").unlink()
    (spoiled / "images" / "2.png").write_bytes((spoiled / "images" / "2.png").read_bytes()[:99])
    pixels, numbers = scene(3, (40, 52))
    Image.fromarray(np.where(numbers == 2, 9, numbers).astype(np.uint8)).save(spoiled / "masks" / "3.png")
    binary, gap = scenes(tmp_path / "binary", 2), scenes(tmp_path / "gap", 2)
    for folder, figure in ((binary, 255), (gap, 5)):
        for mask in (folder / "masks").iterdir():
            Image.fromarray((np.asarray(Image.open(mask)) == 2).astype(np.uint8) * figure).save(mask)
    good, none = scenes(tmp_path / "good", 3), {"class_names": "[]"}
    base = mask_model("segformer", tmp_path / "base", body=True)
    (tmp_path / "empty").mkdir()
    for model, folder, more, said in (
        (base, spoiled, {}, "1.png: no mask"),
        (base, tmp_path / "empty", {}, "expected"),
        (base, binary, none, "the class number 0 alone, and segmentation needs two classes or more; 255 is of no class"),
        (base, gap, none, "the class numbers 0, 5, but not 1, 2, 3 and 1 more; name all classes"),
        (base, good, {"class_names": "[a, a]"}, "class_names holds 'a' twice"),
        (base, good, {"class_names": "[a, b]"}, "holds the class number 2, and the model has 2 classes, 0 to 1"),
        (base, good, {"packing": "true"}, "which is for objective language_modeling, not for semantic_segmentation: drop it"),
        (base, good, {"method": "prefix"}, "method prefix trains no head of masks"),
        (base, good, {"tasks": spoiled}, "1.png: no mask"),
        (tiny_folder, good, {}, "of which there is no model of semantic segmentation; give a SegFormer"),
    ):
        assert main(words(model, folder, tmp_path / "run", **more)) == 2, said
        assert said in capsys.readouterr().err.strip().splitlines()[-1], said
        assert not (tmp_path / "run").exists()
    skipping = {"bad_items": "skip", "max_steps": 1, "tasks": spoiled}
    assert main(words(base, spoiled, tmp_path / "run", **skipping)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["data"]["training"] == {"examples": 3, "unusable": 3}
    summary = json.loads((tmp_path / "run" / "scores" / "after" / "results.json").read_text())
    assert summary["results"][0]["total"] == 3 and len(summary["unusable"]) == 3
