"""doratune compare on a model of images and text: the base and a cell as real processes, analysis and page with its images."""

import json

import yaml
from pictures import COLOURS, image_folder, llava_items, model_folder, write_items

from doratune.cli.main import main


def test_a_grid_of_a_model_that_sees(tmp_path, capsys):
    """Images lie in a folder of their own, which the base model's scoring, the cells and the page must find."""
    model_folder(tmp_path / "model")
    folder = image_folder(tmp_path / "elsewhere" / "images")
    write_items(tmp_path / "train.json", llava_items(24))
    (tmp_path / "tasks").mkdir()
    write_items(tmp_path / "tasks" / "talks.json", [item | {"choices": ["yes", *COLOURS]} for item in llava_items(8)])
    asked = [{"image": f"{c}.png", "question": "What colour is it?", "answer": c} for c in ("red", "green", "blue", "red")]
    write_items(tmp_path / "tasks" / "colours.json", asked)
    tasks = [str(tmp_path / "tasks" / name) for name in ("talks.json", "colours.json")]
    settings = {"model": str(tmp_path / "model"), "data": str(tmp_path / "train.json"), "images": str(folder), "tasks": tasks}
    settings |= {"tasks_protocol": "generate", "eval_size": 4, "targets": ["q_proj", "v_proj"], "rank": 2, "max_steps": 2}
    settings |= {"projector": "whole", "batch_size": 4, "dtype": "float32", "tensorboard": False, "lr": 0.01}
    values = {"settings": settings, "methods": ["dora"], "seeds": [0], "score": "generate", "analyze": ["q_proj"]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    output = tmp_path / "grid"
    assert main(["compare", str(tmp_path / "grid.yaml"), "--output", str(output)]) == 0
    capsys.readouterr()
    found = json.loads((output / "compare.json").read_text())
    base, after = (
        json.loads((place / "results.json").read_text())["results"]
        for place in (output / "base", output / "cells" / "dora-r2-lr0.01-s0" / "scores" / "after")
    )
    assert [(r["task"], r["total"], r["majority"]) for r in base] == [(r["task"], r["total"], r["majority"]) for r in after]
    assert found["facts"]["items"] == 12 and found["rows"][0]["method"] == "dora"
    assert any(note.startswith("base model, generate: ") and "most frequent answer: " in note for note in found["notes"])
    assert not [note for note in found["notes"] if "failed" in note or "no analysis" in note]
    points = json.loads((output / "analysis" / "points.json").read_text())
    assert [len(run["points"]) for run in points.values()] == [2]  # a point a layer
    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 4 and "base model" in page
