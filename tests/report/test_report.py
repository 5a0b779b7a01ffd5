"""`doratune report` on runs that were really trained and scored (a tiny model), and its page in a real browser."""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import browser as chromium
import pytest
import yaml
from conftest import tiny_llama

import doratune
from doratune.analysis.points import Point, regression
from doratune.cli.main import main
from doratune.evaluation.evaluate import evaluate
from doratune.report.page import build
from doratune.report.scores import Z, wilson
from doratune.report.tables import Table
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train

HOSTILE = "</pre></script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & <b>bold</b>"
NAMES = ("dora-0", "dora-1", "lora <b>&amp; 'bold'")  # the last is a folder's name like any other


def questions(count=12):
    return [{"instruction": f"{HOSTILE} is {i} even?", "answer": ("true", "false")[i % 2]} for i in range(count)]


def score(model, tokenizer, output):
    evaluate(model, tokenizer, [("parity", questions())], batch_size=12, max_new_tokens=2, output=output)


@pytest.fixture(scope="module")
def runs(tiny_folder, tiny_tokenizer, tmp_path_factory):
    """Two seeds of DoRA and one of LoRA, two checkpoints each, scored before and after."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"instruction": f"Is {i} even?", "input": "", "output": f"the correct answer is {i % 2 == 0}"} for i in range(24)]
    (folder / "data.json").write_text(json.dumps(rows))
    score(tiny_llama(), tiny_tokenizer, folder / "before")
    for name, seed in zip(NAMES, (0, 1, 0)):
        recipe = TrainRecipe(
            model=str(tiny_folder),
            data=str(folder / "data.json"),
            output=str(folder / name),
            method=name[:4],
            seed=seed,
            rank=2,
            targets=["q_proj", "v_proj", "o_proj"],
            lr=5e-3,
            batch_size=4,
            eval_size=4,
            save_steps=3,
            log_steps=1,
            keep_checkpoints=5,
            dtype="float32",
            tensorboard=False,
        )
        train(recipe, say=lambda line: None)
        model = doratune.load(tiny_llama(), folder / name / "adapter")
        score(model, tiny_tokenizer, folder / name / "scores" / "after")
        shutil.copytree(folder / "before", folder / name / "scores" / "before")
    return [folder / name for name in NAMES]


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    """(the page of all three runs, what build returned)."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    return output, build(runs, output, say=lambda line: None)


@pytest.fixture
def copies(runs, tmp_path):
    """Runs of one's own to break, under plain names."""
    return [Path(shutil.copytree(run, tmp_path / name)) for run, name in zip(runs, ("a", "b", "c"))]


def call(*arguments, output=None):
    return main(["report", *map(str, arguments), "--analysis", "none", *(["--output", str(output)] if output else [])])


# ---- what the page holds


def test_the_page_says_what_the_files_say(runs, report):
    page, facts = report[0].read_text(), report[1]
    assert facts["runs"] == list(NAMES) and facts["bytes"] == report[0].stat().st_size
    assert facts["points"] == 3 * 2 * 2 * 2  # runs, checkpoints, layers, modules (o_proj is none of the default ones)
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    results = json.loads((runs[0] / "scores" / "after" / "results.json").read_text())["results"]
    assert f"{metrics['final_loss']:.4g}" in page and f"{metrics['tokens']:,}" in page
    for result in results:
        low, high = wilson(result["right"], result["total"])
        assert f"{100 * low:.1f} – {100 * high:.1f}" in page
        assert f"{result['right']} of {result['total']}" in page
    assert "lora &lt;b&gt;&amp;amp; &#39;bold&#39;" in page and "<b>bold</b>" not in page
    for words in ("base model", "most frequent answer", "chance", "What differs", "learning_rate", "q_proj, v_proj, o_proj"):
        assert words in page, words


def test_the_interval_is_wilsons():
    """Its ends are the shares that the data stand z standard errors away from."""
    for right, total in ((0, 7), (3, 7), (7, 7), (232, 320)):
        p, (low, high) = right / total, wilson(right, total)
        assert 0 <= low <= p <= high <= 1
        for end in (low, high):
            if 1e-9 < end < 1 - 1e-9:
                assert abs(p - end) == pytest.approx(Z * (end * (1 - end) / total) ** 0.5, rel=1e-9)
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))


@pytest.mark.parametrize(
    ("before", "after", "kinds", "counts"),
    [
        (
            "010100011000",
            "011010111001",
            ["learned"] * 4 + ["lost"] + ["wrong both times"],
            "<span>4 learned</span><span>1 lost</span><span>4 wrong both times</span><span>3 right both times</span>",
        ),
        (
            "000000011111",
            "111111100001",
            ["learned"] * 3 + ["lost"] * 3,
            "<span>7 learned</span><span>4 lost</span><span>1 right both times</span>",
        ),
    ],
)
def test_items_whose_verdict_changed_come_first(before, after, kinds, counts, copies, tmp_path):
    for when, right in (("before", before), ("after", after)):
        path = copies[0] / "scores" / when / "parity.generate.jsonl"
        items = [json.loads(line) | {"correct": r == "1"} for line, r in zip(path.read_text().splitlines(), right)]
        path.write_text("\n".join(map(json.dumps, items)))
    assert call(copies[0], output=tmp_path / "r.html") == 0
    page = (tmp_path / "r.html").read_text()
    assert [part.split("<")[0] for part in page.split('<p class="kind">')[1:]] == kinds
    assert counts in page
    assert "what stands around every prompt" in page


def test_a_comparison_brings_its_base_tables_and_points(runs, report, tmp_path):
    cells = tmp_path / "compare" / "cells"
    for run, name in zip(runs, ("dora-s0", "dora-s1", "lora-s0")):
        shutil.copytree(run, cells / name, ignore=shutil.ignore_patterns("before"))
    shutil.copytree(runs[0] / "scores" / "before", tmp_path / "compare" / "base")
    table = {
        "title": "Over seeds",
        "columns": ["method", "mean"],
        "rows": [["dora", 0.51234567], ["lora", {"no": ["figure"]}, "one too many"], "no row"],
        "note": "two seeds",
    }
    (tmp_path / "compare" / "compare.json").write_text(json.dumps({"tables": [table]}))
    point = {"name": "x", "layer": 0, "module": "q_proj", "step": 3, "magnitude": 0.1, "direction": 0.2}
    (tmp_path / "compare" / "analysis").mkdir()
    points = {str(cells / "lora-s0"): {"points": [point]}, "dora-s1": {"points": [point, {"layer": "?"}]}, "other": {"points": []}}
    (tmp_path / "compare" / "analysis" / "points.json").write_text(json.dumps(points))
    said = []
    more = Table("By hand", ["what", "figure"], [["x", 3]], "a note")
    facts = build([tmp_path / "compare"], tmp_path / "r.html", tables=[more], notes=["said beforehand"], say=said.append)
    assert facts["runs"] == ["dora-s0", "dora-s1", "lora-s0"] and facts["points"] == 2
    page = (tmp_path / "r.html").read_text()
    assert "one too many" not in page
    for words in ("Over seeds", "0.5123", "two seeds", "By hand", "a note", "said beforehand", "base model"):
        assert words in page, words
    assert any("1 of its 2 points are no points" in line for line in said)
    assert any("the analysis holds other, which is none of the runs" in line for line in said)


# ---- what is wrong with runs


def broken(run: Path, file: str, text: str) -> Path:
    (run / file).write_text(text)
    return run


def spoil(what, a, b):
    """Break run a (or make b unlike it); the warning to expect."""
    if what == "unfinished":
        (a / "metrics.json").unlink()
    elif what == "metrics":
        broken(a, "metrics.json", '{"steps": 3')
    elif what == "recipe":
        broken(a, "recipe.yaml", "rank: [4\n")
    elif what == "results":
        broken(a, "scores/after/results.json", "[]")
    elif what == "entries":
        broken(a, "scores/after/results.json", '{"results": [{"task": "parity", "protocol": "generate", "right": 5, "total": 0}]}')
    elif what == "items":
        with open(a / "scores/after/parity.generate.jsonl", "a") as file:
            file.write('{"prompt": "half\n')
    elif what == "shapes":
        shutil.copyfile(b / "adapter" / "adapter_model.safetensors", a / "checkpoint-3" / "adapter_model.safetensors")
    elif what == "tensors":
        (a / "adapter" / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    elif what == "twice":
        shutil.copyfile(a / "recipe.yaml", b / "recipe.yaml")
    elif what in ("data", "epochs"):
        recipe = yaml.safe_load((a / "recipe.yaml").read_text())
        broken(a, "recipe.yaml", yaml.safe_dump(recipe | {what: {"data": "other.json", "epochs": 2.0}[what]}))
    elif what == "tasks":
        results = json.loads((a / "scores/after/results.json").read_text())
        broken(a, "scores/after/results.json", json.dumps({"results": [r | {"total": 13} for r in results["results"]]}))
    elif what in ("magnitude_moved", "zero_rows"):
        metrics = json.loads((a / "metrics.json").read_text())
        broken(
            a, "metrics.json", json.dumps(metrics | {what: {"magnitude_moved": 0.0, "zero_rows": {"x.q_proj": 2, "y": 3}}[what]})
        )
    elif what == "unparsable":
        results = json.loads((a / "scores/after/results.json").read_text())
        results["results"] = [r | {"unparsable": 0.06 if r["protocol"] == "generate" else 0.05} for r in results["results"]]
        broken(a, "scores/after/results.json", json.dumps(results))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unfinished", "a is unfinished: it has no metrics.json"),
        ("metrics", "metrics.json is not valid JSON"),
        ("recipe", "recipe.yaml is not a readable YAML file"),
        ("results", "results.json holds a list, expected a JSON object"),
        ("entries", "results.json holds entries that are no results"),
        ("items", "1 lines are no items, the first is line 13"),
        ("shapes", "its checkpoints are not of one run"),
        ("tensors", "adapter_model.safetensors is truncated or corrupt"),
        ("twice", "a and b ran the same recipe with the same seed (0)"),
        ("data", "runs of different data: other.json (a); "),
        ("epochs", "runs of different epochs: 2 (a); 1 (b)"),
        ("tasks", "runs scored on different tasks or items: parity 13 (a); parity 12 (b)"),
        ("magnitude_moved", "a: the magnitude did not move"),
        ("zero_rows", "a: 5 rows without direction in 2 layers"),
        ("unparsable", "a: 6.0 % of its outputs on parity (generate) hold no answer"),
    ],
)
def test_what_is_wrong_is_a_line_and_the_rest_comes_out(what, message, copies, tmp_path, capsys):
    a, b, c = copies
    spoil(what, a, c if what == "shapes" else b)
    assert call(a, b, "--json", output=tmp_path / "r.html") == 0
    captured = capsys.readouterr()
    warnings = json.loads(captured.out.splitlines()[-1])["warnings"]
    found = [line for line in warnings if message in line]
    assert len(found) == 1 and f"warning: {found[0]}\n" in captured.out
    assert captured.err == ""
    page = (tmp_path / "r.html").read_text()
    assert page.count("<h3>Accuracy, generate</h3>") == (2 if what in ("data", "tasks", "recipe") else 1)  # unlike runs apart
    assert ('<p class="group">' in page) == (what in ("data", "tasks", "recipe"))
    tokens = json.loads((b / "metrics.json").read_text())["tokens"]
    assert f"{tokens:,}" in page  # run b is there all the same


def test_healthy_runs_have_no_other_warning(runs, report):
    """A tiny model with random weights answers at random: that is said, and nothing else."""
    assert all("hold no answer" in line for line in report[1]["warnings"])


def test_a_run_that_cannot_be_measured_leaves_the_others(copies, tmp_path):
    a, b, _ = copies
    spoil("tensors", a, b)
    said = []
    facts = build([a, b], tmp_path / "r.html", say=said.append)
    assert facts["points"] == 2 * 2 * 2 + 2 * 2 * 2  # a's whole checkpoints are there: its last result is what broke
    assert sum("truncated or corrupt" in line for line in facts["warnings"]) == 1
    for checkpoint in a.glob("checkpoint-*"):
        shutil.copyfile(a / "adapter" / "adapter_model.safetensors", checkpoint / "adapter_model.safetensors")
    facts = build([a, b], tmp_path / "r.html", overwrite=True, say=said.append)
    assert facts["points"] == 2 * 2 * 2 and "and 1 more of its checkpoints" in " ".join(facts["warnings"])
    facts = build([b], tmp_path / "r.html", modules=["qproj"], overwrite=True, say=said.append)
    assert facts["points"] == 0 and any("no weight is named qproj" in line for line in facts["warnings"])


def test_full_fine_tuning_is_measured_too(runs, tiny_folder, tmp_path):
    model = doratune.load(tiny_llama(), runs[0] / "adapter")
    doratune.merge(model)
    model.save_pretrained(tmp_path / "full" / "model")
    (tmp_path / "full" / "recipe.yaml").write_text(yaml.safe_dump({"model": str(tiny_folder), "method": "full"}))
    facts = build([runs[0], tmp_path / "full"], tmp_path / "r.html", say=lambda line: None)
    assert facts["points"] == 8 + 4
    assert not any("full" in line and "unfinished" not in line for line in facts["warnings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs is not set"),
        (["nowhere"], "nowhere: no such folder"),
        (["EMPTY"], "is no run: it holds none of recipe.yaml"),
        (["A", "A"], "twice; name each run once"),
        (["A", "--output", "EXISTS"], "pass --overwrite"),
        (["A", "--output", "EMPTY"], "is a folder; give the name of a file"),
        (["A", "--analysis", "autp"], "autp/points.json is missing; give --analysis auto, none"),
        (["A", "--titel", "x"], "unknown setting --titel; did you mean 'title'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "exists.html").write_text("mine")
    places = {"A": str(runs[0]), "EMPTY": "empty", "EXISTS": "exists.html"}
    assert main(["report", *(places.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "exists.html"]
    assert (tmp_path / "exists.html").read_text() == "mine"


def test_without_the_extra_it_says_what_to_install(runs, tmp_path, capsys, monkeypatch):
    for name in ("plotly", "plotly.offline"):
        monkeypatch.setitem(sys.modules, name, None)
    assert call(runs[0], output=tmp_path / "r.html") == 2
    assert capsys.readouterr().err == "doratune report: a report needs plotly; pip install 'doratune[report]'\n"


# ---- the page in a browser


@pytest.fixture(scope="module")
def browser():
    if lacks := chromium.missing():
        if chromium.required():
            pytest.fail(f"DORATUNE_REQUIRE_BROWSER is set, but there is not {lacks}")
        pytest.skip(f"there is not {lacks}")
    with chromium.launched() as browser:
        yield browser


def expect(locator):
    """What waits until it holds; the package may be missing."""
    from playwright.sync_api import expect

    return expect(locator)


@contextlib.contextmanager
def opened(browser, path, **settings):
    """The page; at the end nothing may have gone wrong in it, and nothing may have left it."""
    context = browser.new_context(**settings)
    page = context.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("#curves-chart .scatterlayer .trace")
    try:
        yield page
        assert problems == []
        assert [url for url in requests if not url.startswith("data:")] == [path.resolve().as_uri()]
    finally:
        context.close()


POINTS = ".panel:not([hidden]) .scatterlayer .point"


def drawn(page):
    return page.locator(POINTS).count()


def test_charts_are_drawn(browser, runs, report):
    with opened(browser, report[0]) as page:
        assert page.title().startswith("3 training runs: dora-0")
        logs = [json.loads((run / "metrics.json").read_text())["log"] for run in runs]
        assert page.locator("#curves-chart .scatterlayer .trace").count() == 9  # loss, evaluation loss, learning rate
        assert page.locator("#curves-chart .legendtext").all_text_contents() == list(NAMES)
        points = sum(key in row for log in logs for row in log for key in ("loss", "eval_loss"))
        assert page.locator("#curves-chart .xy .scatterlayer .point").count() == points
        assert drawn(page) == report[1]["points"] == 24
        assert page.locator(".panel").count() == 3
        assert "24 of 24 points" in page.locator("#count").text_content()
        page.locator("#curves-chart .legendtoggle").first.click()
        expect(page.locator("#curves-chart .scatterlayer .trace")).to_have_count(6)


def test_the_line_is_the_analysis_regression(browser, report):
    with opened(browser, report[0]) as page:
        points = json.loads(page.locator("#data").text_content())["points"]
        for number, name in enumerate(NAMES):
            own = [Point(**{key: value for key, value in p.items() if key != "run"}) for p in points if p["run"] == name]
            shown = float(page.locator(".panel").nth(number).get_attribute("data-correlation"))
            assert shown == pytest.approx(regression(own).correlation, abs=1e-9)


def test_filters_leave_out_points(browser, report):
    with opened(browser, report[0]) as page:
        page.get_by_role("checkbox", name="q_proj").uncheck()
        assert drawn(page) == 12
        page.get_by_label("from").fill("1")
        assert drawn(page) == 6
        page.get_by_label("from").fill("")
        assert drawn(page) == 12
        page.get_by_role("checkbox", name="dora-1").uncheck()
        assert drawn(page) == 8 and page.locator(".panel:visible").count() == 2
        page.get_by_label("to", exact=True).fill("0")
        assert drawn(page) == 4 and "4 of 24" in page.locator("#count").text_content()
        assert "too few or too alike" in page.locator(".panel").first.text_content()
        page.get_by_role("checkbox", name="v_proj").uncheck()
        assert drawn(page) == 0
        page.get_by_role("checkbox", name="q_proj").check()
        page.get_by_role("checkbox", name="v_proj").check()
        page.get_by_role("checkbox", name="dora-1").check()
        page.get_by_label("to", exact=True).fill("1")
        assert drawn(page) == 24


def curve_names(page):
    return page.locator("#layers-chart .legendtext").all_text_contents()


def curve_data(page):
    """What plotly was given: [{name, x, y}]."""
    return page.evaluate("document.getElementById('layers-chart').data.map((t) => ({ name: t.name, x: [...t.x], y: [...t.y] }))")


def test_curves_along_the_layers(browser, report):
    """Fig. 3: the last checkpoint's points, one line a run and module; the choice switches what is drawn."""
    with opened(browser, report[0]) as page:
        points = json.loads(page.locator("#data").text_content())["points"]
        end = max(p["step"] for p in points)
        choice = page.get_by_label("shown", exact=True)
        assert choice.locator("option").all_text_contents() == [
            "ΔM",
            "ΔD",
            "|Δm|/m",
            "effective rank",
            "singular values of the update",
        ]
        for value, key in (("magnitude",) * 2, ("relative",) * 2, ("effective_rank",) * 2, ("direction",) * 2):
            choice.select_option(value)
            expect(page.locator("#layers-chart .scatterlayer .trace")).to_have_count(6)
            drawn_lines = curve_data(page)
            pairs = [(name, module) for name in NAMES for module in ("q_proj", "v_proj")]
            assert curve_names(page) == [f"{name} · {module}" for name, module in pairs]
            for line, (name, module) in zip(drawn_lines, pairs):
                own = [p for p in points if (p["run"], p["module"], p["step"]) == (name, module, end)]
                own = sorted(own, key=lambda p: p["layer"])
                assert (line["x"], line["y"]) == ([p["layer"] for p in own], [p[key] for p in own])
        assert "1 − cos" in page.locator("#quantity-note").text_content()


def test_filters_and_themes_reach_the_curves(browser, report):
    with opened(browser, report[0]) as page:
        lines = page.locator("#layers-chart .scatterlayer .trace")
        page.get_by_role("checkbox", name="v_proj").uncheck()
        expect(lines).to_have_count(3)
        page.get_by_role("checkbox", name="dora-1").uncheck()
        expect(lines).to_have_count(2)
        page.get_by_label("from").fill("1")
        assert [line["x"] for line in curve_data(page)] == [[1], [1]]
        before = page.evaluate("getComputedStyle(document.querySelector('#layers-chart .xtick text')).fill")
        page.locator("#theme").click()
        assert page.evaluate("getComputedStyle(document.querySelector('#layers-chart .xtick text')).fill") != before
        page.get_by_label("shown", exact=True).select_option("spectra")
        expect(lines).to_have_count(2)
        page.get_by_label("from").fill("0")
        expect(lines).to_have_count(4)
        assert all(line["x"] == [1, 2] and line["y"][0] >= line["y"][1] > 0 for line in curve_data(page))  # rank 2
        page.get_by_role("checkbox", name="q_proj").uncheck()
        expect(lines).to_have_count(0)
        assert "nothing of the runs" in page.locator("#layers-chart").text_content()


def test_points_of_an_older_analysis(browser, runs, tmp_path):
    """Points without the newer figures, a run that could not be measured, and gradients: what is there is offered."""
    point = {"name": "l.0.q_proj", "layer": 0, "module": "q_proj", "step": 3, "magnitude": 0.1, "direction": 0.2}
    old = {str(runs[0]): {"line": None, "points": [point, point | {"layer": 1}]}, str(runs[1]): {"problem": "is\ntruncated"}}
    facts = build(runs, tmp_path / "r.html", points=old, say=lambda line: None)
    assert facts["points"] == 2 and f"{NAMES[1]}: is truncated" in facts["warnings"]
    with opened(browser, tmp_path / "r.html") as page:
        options = page.locator("#quantity option").all_text_contents()
        assert page.locator("#layers-chart .scatterlayer .trace").count() == 1
    assert options == ["ΔM", "ΔD"]
    spectra = {
        "l.0.q_proj": {"values": [0.4, 0.2, 1e-9, 0.0], "norm": 2.0, "effective_rank": 1.9},
        "x": 3,
        "y": {"values": [1], "norm": 0},
    }
    new = {str(runs[0]): {"points": [point | {"gradient_share": 0.031}], "spectra": spectra}}
    build(runs, tmp_path / "r.html", points=new, overwrite=True, say=lambda line: None)
    with opened(browser, tmp_path / "r.html") as page:
        page_options = page.locator("#quantity option").all_text_contents()
        page.locator("#quantity").select_option("gradient_share")
        page_lines = curve_data(page)
        page.locator("#quantity").select_option("spectra")
        assert [line["y"] for line in curve_data(page)] == [[0.2, 0.1]]
    assert page_options[2:] == ["gradient's share on magnitude", "singular values of the update"]
    assert page_lines[0]["y"] == [0.031]


def test_a_point_says_what_it_is(browser, report):
    with opened(browser, report[0]) as page:
        page.locator(".panel").last.scroll_into_view_if_needed()
        page.locator(".panel").last.locator(".scatterlayer .point").first.hover(force=True)
        page.wait_for_selector(".panel .hovertext")
        words = page.locator(".panel .hovertext").first.text_content()
        assert "layer 0, " in words and "_proj" in words and "step 3" in words and NAMES[-1] in words and "ΔD" in words


def colours(page):
    """Of the page, of the curves' text and of the points' text."""
    fill = "getComputedStyle(document.querySelector('{} .xtick text')).fill"
    fills = ", ".join(fill.format(place) for place in ("#curves-chart", ".panel"))
    return page.evaluate(f"[getComputedStyle(document.body).backgroundColor, {fills}]")


def test_themes(browser, report):
    with opened(browser, report[0], color_scheme="light") as page:
        light = colours(page)
        page.locator("#theme").click()
        dark = colours(page)
        assert all(a != b for a, b in zip(light, dark))
        page.locator("#theme").click()
        assert colours(page) == light
    with opened(browser, report[0], color_scheme="dark") as page:
        assert colours(page) == dark
        page.emulate_media(color_scheme="light")  # the system changes its mind while the page is open
        expect(page.locator(".panel .xtick text").first).to_have_css("fill", light[2])
        assert colours(page) == light


@pytest.mark.parametrize("width", [390, 1200])
def test_no_page_scrolls_sideways(width, browser, report):
    with opened(browser, report[0], viewport={"width": width, "height": 800}) as page:
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(
            "[...document.querySelectorAll('.main-svg')].every((s) => s.getBoundingClientRect().right <= innerWidth)"
        )
        if width == 390:  # the wide table scrolls in its box
            assert page.evaluate(
                "(() => { const b = document.querySelector('#runs .scroll'); return b.scrollWidth > b.clientWidth; })()"
            )


def test_what_models_are_asked_is_text(browser, runs, tmp_path):
    """HTML in prompts, in names of modules and in tasks stays text, in the page and in its data."""
    point = {"name": HOSTILE, "layer": 0, "module": HOSTILE, "step": 3, "magnitude": 0.1, "direction": 0.2}
    analysis = {str(runs[0]): {"points": [point, point | {"magnitude": 0.2}]}}
    table = Table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, "half a pair \ud800"]], HOSTILE)
    arguments = {"points": analysis, "title": HOSTILE, "tables": [table], "notes": [HOSTILE], "say": lambda line: None}
    build(runs, tmp_path / "r.html", **arguments)
    with opened(browser, tmp_path / "r.html") as page:
        assert page.evaluate("window.hacked") is None
        assert page.title() == HOSTILE
        assert HOSTILE in page.locator("#samples article pre").first.text_content()
        assert HOSTILE in page.locator("#filter-modules").text_content()
        assert HOSTILE in page.locator("#layers-chart .legendtext").first.text_content()
        assert page.locator("img").count() == 0 and drawn(page) == 2


def test_score_by_rank(browser, runs, tmp_path):
    """A comparison's curves: one line a method with the interval's bars; what is no point is left out."""
    cells = tmp_path / "compare" / "cells"
    shutil.copytree(runs[0], cells / "dora-s0")
    points = [{"x": x, "mean": m, "low": m - 0.1, "high": m + 0.1, "count": 3} for x, m in ((4, 0.3), (16, 0.5), (64, 0.4))]
    series = {"dora": points, HOSTILE: [points[0] | {"low": None, "high": None}, {"x": None, "mean": 1}, "no point"]}
    curve = {"title": "accuracy by rank", "x": "rank", "y": "accuracy, likelihood", "series": series}
    (tmp_path / "compare" / "compare.json").write_text(json.dumps({"curves": [curve, {"series": 3}, "none"]}))
    build([tmp_path / "compare"], tmp_path / "r.html", analysis="none", say=lambda line: None)
    with opened(browser, tmp_path / "r.html") as page:
        assert page.locator(".chart.grid").count() == 1
        assert page.locator(".chart.grid .scatterlayer .trace").count() == 2
        assert page.locator(".chart.grid .scatterlayer .point").count() == 4
        assert page.locator(".chart.grid .yerror").count() == 3
        assert page.locator(".chart.grid .xtick text").all_text_contents() == ["4", "16", "64"]
        assert page.evaluate("window.hacked") is None


def test_a_page_of_little(browser, runs, tmp_path):
    """Neither scores nor points nor a log: the page says so."""
    (tmp_path / "bare").mkdir()
    shutil.copyfile(runs[0] / "recipe.yaml", tmp_path / "bare" / "recipe.yaml")
    build([tmp_path / "bare"], tmp_path / "r.html", say=lambda line: None)
    context = browser.new_context()
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "r.html").as_uri())
    page.wait_for_selector("text=no log in any run")
    assert "No points were measured" in page.content() and "unfinished" in page.content() and errors == []
    assert page.locator("#scores").is_hidden() and page.locator("nav a").all_text_contents()[:2] == ["Runs", "Cost"]
    context.close()


def test_a_picture_of_the_page(browser, report, tmp_path):
    """What docs/report.png is made with."""
    chromium.picture(browser, report[0], tmp_path / "r.png", "dark", 500)
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
