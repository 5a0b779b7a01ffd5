"""Answers to fixed prompts, from a run's metrics.json onto the page."""

import html
import json

from doratune.cli.main import main


def test_answers_stand_on_the_page_by_prompt_and_step(tiny_folder, tmp_path):
    items = [{"prompt": f"<b>{i}</b>", "completion": "true"} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    words = ["--model", str(tiny_folder), "--data", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "run"), "--rank", "2"]
    words += ["--max_steps", "2", "--sample_prompts", "<i>why?", "and then?", "--sample_steps", "1", "--sample_tokens", "4"]
    assert main(["train", *words, "--dtype", "float32", "--batch_size", "4"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    broken = [None, {"step": "x", "prompt": "no", "output": "no"}, {"prompt": "lost"}]
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics | {"samples": [*metrics["samples"], *broken]}))
    assert main(["report", str(tmp_path / "run"), "--analysis", "none", "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    section = page.partition('<section id="answers">')[2].partition("</section>")[0]
    assert "<pre>&lt;i&gt;why?</pre>" in section and "<i>why?" not in section and "lost" not in section
    assert section.count("step 0") == section.count("step 1") == section.count("step 2") == 2
    assert html.escape(metrics["samples"][0]["output"], quote=False)[:3] in section
