"""Figures of segmentations: worked out by hand, over all pixels, at the masks' own sizes; grids and the report page show them."""

import json

import numpy as np
import pytest
import torch
from mask_models import NAMES, labels, mask_model, scene, scenes, words
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

from doratune.cli.main import main
from doratune.comparison.collect import read_verdicts
from doratune.data.encode import IGNORED
from doratune.training.mask_rows import answers_at
from doratune.training.mask_scores import iou_of, mask_scores, pixel_counts


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A folder of a SegFormer with a head for the three classes that was never trained, but is sure of itself."""
    folder = mask_model("segformer", tmp_path_factory.mktemp("models") / "segformer", **labels(*NAMES))
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    with torch.no_grad():
        model.decode_head.classifier.weight.mul_(300)
    model.save_pretrained(folder)
    return folder


def evaluate(model, task, output, **settings):
    usual = {"model": model, "task": task, "output": output}
    return main(["evaluate", *(f"--{name}={value}" for name, value in (usual | settings).items())])


def test_figures_by_hand():
    gold = np.array([[0, 0, 1], [1, 1, IGNORED]])
    answers = np.array([[0, 1, 1], [1, 3, 0]])
    counts = pixel_counts(gold, answers, 4)
    assert counts.tolist() == [[1, 2, 0, 0], [2, 3, 0, 0], [1, 3, 0, 1]]
    assert iou_of(counts)[[0, 1, 3]].tolist() == [1 / 2, 2 / 4, 0] and np.isnan(iou_of(counts)[2])  # class 2 occurs nowhere
    assert mask_scores(counts) == pytest.approx({"mean_iou": 1 / 3, "pixel_accuracy": 3 / 5})
    nothing = pixel_counts(np.full((2, 2), IGNORED), np.zeros((2, 2), int), 4)
    assert nothing.sum() == 0 and np.isnan(mask_scores(nothing)["mean_iou"])


def test_answers_are_those_of_transformers_at_any_size():
    import transformers

    logits = torch.randn(7, 9, 11, generator=torch.Generator().manual_seed(0))
    processor = transformers.SegformerImageProcessorPil()
    output = transformers.modeling_outputs.SemanticSegmenterOutput(logits=logits[None])
    for size in ((9, 11), (40, 13), (5, 30)):
        theirs = processor.post_process_semantic_segmentation(output, target_sizes=[size])[0]
        assert (answers_at(logits, size) == theirs.numpy()).all()


def test_figures_are_over_all_pixels_of_masks_of_their_own_sizes(segmenter, tmp_path):
    data = scenes(tmp_path / "data", 5, sizes=((40, 52), (64, 30), (21, 33)))
    assert evaluate(segmenter, data, tmp_path / "e", batch_size=2) == 0
    result = json.loads((tmp_path / "e" / "results.json").read_text())["results"][0]
    records = [json.loads(line) for line in (tmp_path / "e" / "data.likelihood.jsonl").read_text().splitlines()]
    assert result["pixels"] == 2 * 40 * 52 + 2 * 64 * 30 + 21 * 33 and result["total"] == len(records) == 5
    known = [share for share in result["iou"].values() if share is not None]
    assert result["mean_iou"] == pytest.approx(np.mean(known)) and list(result["iou"]) == list(NAMES)
    assert result["accuracy"] == pytest.approx(np.mean([r["score"] for r in records]))
    assert result["right"] == sum(r["score"] > 0.5 for r in records)
    gold = scene(0, (40, 52))[1]
    shares = [(name, (gold == i).mean()) for i, name in enumerate(NAMES)]
    shown = [f"{name} {100 * share:.1f} %" for name, share in sorted(shares, key=lambda one: -one[1])]
    assert records[0]["gold"] == ", ".join(shown)
    with Image.open(tmp_path / "e" / records[0]["image"]) as panel:
        assert panel.size == (3 * 52, 40)


def test_what_cannot_be_scored_is_one_line(segmenter, tmp_path, capsys):
    data = scenes(tmp_path / "data", 2)
    spoiled = AutoModelForSemanticSegmentation.from_pretrained(segmenter)
    with torch.no_grad():
        spoiled.decode_head.classifier.weight[0, 0] = float("nan")
    spoiled.save_pretrained(tmp_path / "spoiled")
    (tmp_path / "spoiled" / "preprocessor_config.json").write_bytes((segmenter / "preprocessor_config.json").read_bytes())
    other = scenes(tmp_path / "other", 2)
    Image.fromarray(np.full((40, 52), 3, np.uint8)).save(other / "masks" / "0.png")
    upernet = mask_model("upernet", tmp_path / "upernet")
    lacking = AutoModelForSemanticSegmentation.from_pretrained(upernet)
    del lacking.backbone.encoder.stages
    lacking.save_pretrained(upernet)
    for model, task, more, said in (
        (segmenter, other, {}, "holds the class number 3, and the model has 3 classes, 0 to 2"),
        (segmenter, data, {"protocol": "generate"}, "set protocol: likelihood"),
        (segmenter, data, {"max_new_tokens": 2}, "max_new_tokens is 2, which is for models that write"),
        (segmenter, "boolq", {}, "boolq: no such images; give a folder with images/ and masks/"),
        (tmp_path / "spoiled", data, {}, "NaN or infinite values"),
        (upernet, data, {}, "transformers would take random weights"),
    ):
        assert evaluate(model, task, tmp_path / "e", **more) == 2, said
        assert said in capsys.readouterr().err.strip().splitlines()[-1], said
        assert not (tmp_path / "e").exists()


def test_runs_beside_one_another_and_the_page_about_them(tmp_path, capsys):
    """A grid compares what was answered image by image; the page shows image, mask and answer."""
    data = scenes(tmp_path / "data", 4)
    base = mask_model("segformer", tmp_path / "base", body=True)
    runs = [tmp_path / "grid" / method for method in ("lora", "dora")]
    for run in runs:
        assert main(words(base, data, run, max_steps=2, tasks=data, method=run.name)) == 0
    verdicts = [read_verdicts(run / "scores" / "after" / "data.likelihood.jsonl", 4) for run in runs]
    assert verdicts[0][1] == verdicts[1][1]  # the same images, whatever was answered
    assert all(((scores >= 0) & (scores <= 1)).all() for scores, _ in verdicts)
    capsys.readouterr()
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "mean IoU" in page and "pixel accuracy" in page and page.count('<img src="data:image/jpeg') == 8
    assert "is not shown" not in page
