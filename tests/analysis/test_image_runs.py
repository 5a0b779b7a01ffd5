"""Runs of image classifiers in inspect, analyze and report: the base is loaded as the class that was trained on it."""

import json

import pytest
from image_models import image_model, photographs, words

from doratune.cli.main import main


@pytest.mark.parametrize(("kind", "layers"), [("vit", 13), ("resnet", 6)])
def test_inspect_analyze_and_report(kind, layers, tmp_path, capsys):
    photos = photographs(tmp_path / "photos", 4)
    base = image_model(kind, tmp_path / "base", body=True)
    assert main(words(base, photos, tmp_path / "dora", max_steps=2, tasks=photos)) == 0
    assert main(words(base, photos, tmp_path / "full", max_steps=2, method="full", tasks=photos)) == 0
    capsys.readouterr()
    assert main(["inspect", "--adapter", str(tmp_path / "dora" / "adapter")]) == 0
    assert f"{layers} layers adapted" in capsys.readouterr().out
    runs = [str(tmp_path / "dora"), str(tmp_path / "full")]
    assert main(["analyze", *runs, "--output", str(tmp_path / "analysis")]) == 0
    points = json.loads((tmp_path / "analysis" / "points.json").read_text())
    names = {run: {point["name"] for point in found["points"]} for run, found in points.items()}
    assert {len(found) for found in names.values()} == {layers}  # of the full run too: its head was drawn, not trained from here
    assert not any("classifier" in name for found in names.values() for name in found)
    assert main(["report", *runs, "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "images/s" in page and "tokens/s" not in page
