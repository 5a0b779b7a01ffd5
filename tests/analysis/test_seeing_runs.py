"""Runs of VL-BART in analyze, inspect and report: q and v over four checkpoints, as in Fig. 2, for full, LoRA and DoRA."""

import json

from image_models import image_model
from seeing_bart import seen_data, tiny_bart, train_words

from doratune.cli.main import main


def test_analyze_inspect_and_report(tmp_path, capsys):
    tower, data = image_model("vit", tmp_path / "tower", body=True), seen_data(tmp_path / "data", 2)
    base = tiny_bart(tmp_path / "bart", steps=30)
    usual = {"max_steps": 8, "save_steps": 2, "keep_checkpoints": 4}
    for method in ("full", "lora", "dora"):
        more = usual | ({"tasks": data} if method == "dora" else {"lr": 1e-3} if method == "full" else {})
        assert main(train_words(base, tower, data, tmp_path / method, method=method, **more)) == 0
    runs = [str(tmp_path / method) for method in ("full", "lora", "dora")]
    assert main(["analyze", *runs, "--modules", "q_proj", "v_proj", "--output", str(tmp_path / "analysis")]) == 0
    capsys.readouterr()
    points = json.loads((tmp_path / "analysis" / "points.json").read_text())
    assert [*points] == runs
    for run, found in points.items():
        names, steps = {p["name"] for p in found["points"]}, {p["step"] for p in found["points"]}
        assert len(names) == 12 and len(steps) == 4, run  # 2 layers: 2 attentions in the decoder, 1 in the encoder; q and v
        assert all(name.endswith(("q_proj", "v_proj")) for name in names) and len(found["points"]) == 48
        assert -1 <= found["line"]["correlation"] <= 1
    assert list((tmp_path / "analysis").glob("*.png")) or list((tmp_path / "analysis").glob("*.html"))
    assert main(["inspect", "--adapter", str(tmp_path / "dora" / "adapter")]) == 0
    assert "12 layers adapted" in capsys.readouterr().out
    assert main(["report", *runs, "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "examples/s" in page and "data:image/jpeg;base64," in page and "What colour is it?" in page
