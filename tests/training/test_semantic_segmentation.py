"""Segmentation from the command line: real files, tiny models of four families, from the first step to the merge."""

import json

import numpy as np
import pytest
import torch
from mask_models import KINDS, NAMES, labels, mask_model, scene, scenes, words
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from doratune.cli.main import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each kind: with a classifier's head, or one for two kinds of masks."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: mask_model(kind, folder / kind, body=kind in ("segformer", "mobilevit")) for kind in KINDS}


def evaluated(output, task, **settings):
    """(figures of the one task, its records)."""
    usual = {"task": task, "output": output, "overwrite": "true"}
    assert main(["evaluate", *(f"--{name}={value}" for name, value in (usual | settings).items())]) == 0
    result = json.loads((output / "results.json").read_text())["results"][0]
    return result, [json.loads(line) for line in (output / f"{result['task']}.likelihood.jsonl").read_text().splitlines()]


def test_train_resume_save_load_merge_evaluate(bases, data, tmp_path):
    base, usual = bases["segformer"], {"schedule": "constant", "save_steps": 5, "lr": 2e-2}
    assert main(words(base, data, tmp_path / "whole", max_steps=10, tasks=data, **usual)) == 0
    assert main(words(base, data, tmp_path / "parts", max_steps=5, **usual)) == 0
    assert main([*words(base, data, tmp_path / "parts", max_steps=10, **usual), "--resume"]) == 0
    whole, parts = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any("decode_head.classifier.weight" in name for name in whole)  # the head came along without being asked for

    one, alone = evaluated(tmp_path / "one", data, adapter=tmp_path / "whole" / "adapter", batch_size=1)
    assert list(one["iou"]) == list(NAMES) and one["mean_iou"] > 0.35 > one["majority"]
    after = json.loads((tmp_path / "whole" / "scores" / "after" / "results.json").read_text())["results"][0]
    assert main(["merge", "--adapter", str(tmp_path / "whole" / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "merged")
    assert [merged.config.id2label[i] for i in range(3)] == list(NAMES)
    others = [evaluated(tmp_path / "eight", data, adapter=tmp_path / "whole" / "adapter", batch_size=8)[0], after]
    others.append(evaluated(tmp_path / "of_merged", data, model=tmp_path / "merged")[0])
    for other in others:
        same_score(one, other)
    assert (tmp_path / "one" / alone[0]["image"]).is_file() and alone[0]["gold"].startswith(("sky ", "ground "))


def same_score(one, other):
    """To the pixels on which two classes agree to rounding."""
    assert other["pixels"] == one["pixels"]
    assert abs(other["pixel_accuracy"] - one["pixel_accuracy"]) * one["pixels"] < 8


@pytest.mark.parametrize("kind", ["mobilevit", "upernet"])
def test_other_families_in_bfloat16(kind, bases, data, tmp_path):
    assert main(words(bases[kind], data, tmp_path / "half", max_steps=1, dtype="bfloat16")) == 0
    names = load_file(tmp_path / "half" / "adapter" / "adapter_model.safetensors").keys()
    assert any(name.endswith("auxiliary_head.classifier.weight") for name in names) == (kind != "mobilevit")
    assert main(["merge", "--adapter", str(tmp_path / "half" / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "merged").config.num_labels == 3


def test_all_weights_with_a_validation_set(bases, data, tmp_path):
    assert main(words(bases["upernet"], data, tmp_path / "full", max_steps=2, method="full", tasks=data, eval_data=data)) == 0
    metrics = json.loads((tmp_path / "full" / "metrics.json").read_text())
    assert metrics["unit"] == "images" and metrics["trainable"] == metrics["total"]
    last = [row for row in metrics["log"] if "eval_loss" in row][-1]
    assert 0 <= last["eval_mean_iou"] <= last["eval_pixel_accuracy"] <= 1
    after = json.loads((tmp_path / "full" / "scores" / "after" / "results.json").read_text())["results"][0]
    same_score(after, evaluated(tmp_path / "again", data, model=tmp_path / "full" / "model")[0])


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """By pixels of a class, of which one image has few: a mean over images, or over batches, would be another training."""
    data = scenes(tmp_path / "data", 4, sizes=((36, 36),))
    base = mask_model("segformer", tmp_path / "base", body=True, classifier_dropout_prob=0.0, drop_path_rate=0.0)
    Image.fromarray(np.pad(scene(0, (4, 36))[1], ((0, 32), (0, 0)), constant_values=255)).save(data / "masks" / "0.png")
    for name, settings in {"one": {"batch_size": 4}, "two": {"batch_size": 2, "gradient_accumulation": 2}}.items():
        more = {"max_steps": 2, "optimizer": "sgd", "lr": 0.5, "max_grad_norm": 0}
        assert main(words(base, data, tmp_path / name, **settings, **more)) == 0
    one, two = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5), name


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
    assert evaluated(tmp_path / "e", data, adapter=tmp_path / "d" / "adapter")[0]["iou"] == pytest.approx(told["iou"], abs=0.01)
    assert main(["merge", "--adapter", str(tmp_path / "d" / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["reduce_labels"] is True


def test_what_cannot_be_trained_is_one_line_or_counted(bases, tmp_path, capsys, tiny_folder):
    spoiled = scenes(tmp_path / "spoiled", 6)
    (spoiled / "masks" / "1.png").unlink()
    (spoiled / "images" / "2.png").write_bytes((spoiled / "images" / "2.png").read_bytes()[:99])
    pixels, numbers = scene(3, (40, 52))
    Image.fromarray(np.where(numbers == 2, 9, numbers).astype(np.uint8)).save(spoiled / "masks" / "3.png")
    binary, gap = scenes(tmp_path / "binary", 2), scenes(tmp_path / "gap", 2)
    for folder, figure in ((binary, 255), (gap, 5)):
        for mask in (folder / "masks").iterdir():
            Image.fromarray((np.asarray(Image.open(mask)) == 2).astype(np.uint8) * figure).save(mask)
    good, base, none = scenes(tmp_path / "good", 3), bases["segformer"], {"class_names": "[]"}
    (tmp_path / "empty").mkdir()
    for model, folder, more, said in (
        (base, spoiled, {}, "1.png: no mask"),
        (base, tmp_path / "empty", {}, "expected"),
        (base, binary, none, "the class number 0 alone, and segmentation needs two classes or more; 255 is of no class"),
        (base, gap, none, "the class numbers 0, 5, but not 1, 2, 3 and 1 more; name all classes"),
        (base, good, {"class_names": "[a, a]"}, "class_names holds 'a' twice"),
        (base, good, {"class_names": "[a, b]"}, "holds the class number 2, and the model has 2 classes, 0 to 1"),
        (base, good, {"packing": "true"}, "objective semantic_segmentation has no use for it"),
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
