"""All eight published tasks in one run, from their own files, and their scores."""

import json
from pathlib import Path

import pytest
from image_models import image_model
from PIL import Image
from published_tasks import published
from seeing_bart import tiny_bart, train_words

from doratune.cli.main import main

pytest.importorskip("pycocoevalcap")


def test_eight_tasks_in_one_run(tmp_path):
    folder = tmp_path / "data"
    for name, places in published(folder).items():
        for path in map(Path, places):
            if path.suffix in (".jpg", ".png"):
                Image.new("RGB", (9, 9), "red").save(path, "PNG")  # whatever its name says
        if name in ("tvqa", "how2qa", "tvc", "yc2c"):  # videos as folders of frames, which count before files
            frames = folder / name / "frames" / "clip_1"
            frames.mkdir(parents=True, exist_ok=True)
            for n in range(12):
                Image.new("RGB", (9, 9), (20 * n, 0, 0)).save(frames / f"{n}.png")
    names = ["vqa", "gqa", "nlvr", "caption", "tvqa", "how2qa", "tvc", "yc2c"]
    sources = json.dumps([f"{name}:{folder / name}:val" for name in names])
    bart, tower = tiny_bart(tmp_path / "bart", max_position_embeddings=200), image_model("vit", tmp_path / "tower", body=True)
    more = {"max_steps": 3, "max_length": 200, "tasks": sources, "batch_size": 4, "data_weights": "[2, 1, 1, 1, 1, 1, 1, 0.5]"}
    assert main(train_words(bart, tower, sources, tmp_path / "run", **more)) == 0
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 8
    summary = json.loads((tmp_path / "run" / "scores" / "after" / "results.json").read_text())
    results = {result["task"]: result for result in summary["results"]}
    assert [*results] == [f"{name}-val" for name in names] and results["nlvr-val"]["total"] == 2
    assert {name for name, result in results.items() if "cider" in result} == {"caption-val", "tvc-val", "yc2c-val"}
    (average,) = summary["averages"]
    assert average["accuracy"] == pytest.approx(sum(result["accuracy"] for result in results.values()) / 8)
    lines = (tmp_path / "run" / "scores" / "after" / "tvqa-val.generate.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["gold"] == "a2" and "[" not in json.loads(lines[0])["prompt"]
