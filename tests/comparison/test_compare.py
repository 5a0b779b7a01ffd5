"""doratune compare: real cells as real processes on a tiny model; choosing, pairing and resuming."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from doratune.cli.main import main
from doratune.comparison.cells import Cell, command, finals, rates, sweep
from doratune.comparison.recipe import CompareRecipe
from doratune.comparison.statistics import holm, over_seeds, paired_bootstrap, paired_difference
from doratune.comparison.summary import Pair, Summary, pair_table
from doratune.errors import UserError


def shared(model="smollm2-135m-instruct", **more):
    return {"model": str(model), "data": "demo", "targets": ["q_proj", "v_proj"], "eval_size": 8, "tasks": ["demo"]} | more


def grid(**more):
    return CompareRecipe(**({"settings": shared(), "methods": ["full", "lora", "dora"]} | more))


def names(cells):
    return [cell.name for cell in cells]


def test_the_cells_of_a_grid():
    one = grid(ranks=[4, 16], seeds=[0, 1], lrs=[1e-3, 3e-4], methods=["full", "lora", "dora_half", "vera"])
    first = sweep(one, one.check())
    assert names(first) == [
        "full-lr0.001-s0", "full-lr0.0003-s0", "lora-r16-lr0.001-s0", "lora-r16-lr0.0003-s0",
        "dora_half-r8-lr0.001-s0", "dora_half-r8-lr0.0003-s0", "vera-r256-lr0.001-s0", "vera-r256-lr0.0003-s0",
    ]  # fmt: skip
    recipe = one.check()
    last = finals(one, recipe, rates(one, recipe, {"full": 1e-3, "lora": 3e-4, "dora_half": 1e-3, "vera": 1e-3}))
    assert [c.configuration for c in last if c.seed == 1] == [
        ("full", None, None), ("lora", 4, None), ("lora", 16, None), ("dora_half", 2, None), ("dora_half", 8, None),
        ("vera", 256, None),
    ]  # fmt: skip
    assert set(names(last)) & set(names(first)) == {
        "full-lr0.001-s0", "lora-r16-lr0.0003-s0", "dora_half-r8-lr0.001-s0", "vera-r256-lr0.001-s0",
    }  # fmt: skip


def test_every_rank_may_have_a_sweep_of_its_own():
    methods = ["full", "lora", "dora_half", "vera"]
    one = grid(ranks=[4, 16], seeds=[0], lrs=[1e-3, 3e-4], methods=methods, sweep_ranks="every")
    assert [(c.method, c.rank) for c in sweep(one, one.check()) if c.lr == 1e-3] == [
        ("full", None), ("lora", 4), ("lora", 16), ("dora_half", 2), ("dora_half", 8), ("vera", 256),
    ]  # fmt: skip
    chosen = {("lora", 4): 1e-3, ("lora", 16): 3e-4, ("full", None): 1e-3}
    assert names(finals(one, one.check(), chosen)) == ["full-lr0.001-s0", "lora-r4-lr0.001-s0", "lora-r16-lr0.0003-s0"]


def test_a_cell_is_a_plain_train_command():
    one = grid(methods=["magnitude_mix"], ranks=[8], sizes=[40], settings=shared(alpha=24, rank=16), output="runs/g")
    words = command(Cell("magnitude_mix", 8, 40, 1e-3, 2), one, one.check())
    assert words[:2] == ["train", "runs/g/recipe.yaml"]
    options = dict(zip(words[2::2], words[3::2]))
    assert options == {
        "--method": "dora",
        "--targets": "[q_proj, k_proj, v_proj]",
        "--magnitude_only": "[o_proj, gate_proj, up_proj, down_proj]",
        "--rank": "8",
        "--alpha": "12.0",  # the scaling stays what the recipe has
        "--limit": "40",
        "--lr": "0.001",
        "--seed": "2",
        "--output": "runs/g/cells/magnitude_mix-r8-n40-lr0.001-s2",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"settings": {}}, "neither recipe nor settings are set; give a grid"),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["lora", "lora"]}, "methods holds lora twice"),
        ({"methods": ["dorra"]}, "unknown method 'dorra'; did you mean 'dora'"),
        ({"seeds": [0, 1, 0]}, "seeds holds 0 twice"),
        ({"ranks": [0]}, "ranks holds 0; expected positive"),
        ({"lrs": [-1.0]}, "lrs holds -1.0; expected positive"),
        ({"tune_seeds": 5}, "tune_seeds is 5; expected 1 to 3"),
        ({"confidence": 95}, "confidence is 95; expected a number between 0 and 1"),
        ({"method_lrs": {"lora": [1e-3, 1e-4]}}, "different numbers of learning rates (full 1, lora 2, dora 1)"),
        ({"method_lrs": {"vera": [1e-3]}}, "method_lrs names 'vera', which is not among methods"),
        ({"method_lrs": {"lora": []}}, "lora has no learning rate"),
        ({"lrs": [1e-3, 1e-4], "settings": shared(eval_size=0)}, "nothing to choose by"),
        ({"settings": shared(tasks=[])}, "no tasks are scored"),
        ({"settings": shared(tasks_protocol="generate")}, "score is likelihood, but tasks_protocol is generate"),
        ({"score": "eval_loss", "settings": shared(eval_size=0)}, "nothing is held out"),
        ({"settings": shared(seed=1)}, "settings holds seed, which the grid itself sets"),
        ({"settings": shared(rnak=1)}, "unknown setting 'rnak' of doratune train; did you mean 'rank'"),
        ({"recipe": "nowhere.yaml"}, "recipe is nowhere.yaml: not a readable YAML file"),
        ({"variants": {"mine": {"rank": 4}}, "methods": ["mine"]}, "mine needs settings with a method"),
        ({"variants": {"mine": {"method": "dora", "lr": 4}}, "methods": ["mine"]}, "'lr' is no setting of a method"),
    ],
)
def test_mistakes_are_one_line(more, message):
    with pytest.raises(UserError) as error:
        grid(**more).check()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ready_grids_expand(pytestconfig):
    """Each grid of recipes/ is valid, and has the methods of its figure or table."""
    expected = {
        "compare_demo.yaml": 9,
        "compare_rank.yaml": 2 * 5 * 3,  # Fig. 5: LoRA and DoRA at five ranks
        "compare_data_size.yaml": 4 * 4 * 3,  # Fig. 4: four methods at four sizes
        "compare_granularity.yaml": 3 * 3,  # Table 6
        "compare_gradient.yaml": 3 * 3,  # Table 7
        "compare_methods.yaml": 6 * 3,  # Table 1
        "compare_four_tasks.yaml": (2 * 3 + 1) * 3,
        "compare_arithmetic.yaml": 4 * 3,
    }
    folder = pytestconfig.rootpath / "recipes"
    assert {p.name for p in folder.glob("compare_*.yaml")} == set(expected)
    for name, count in expected.items():
        values = yaml.safe_load((folder / name).read_text())
        if values.get("recipe"):
            values["recipe"] = str(pytestconfig.rootpath / values["recipe"])
        one = CompareRecipe(**values)
        training = one.check()
        assert len(finals(one, training, rates(one, training, dict.fromkeys(one.methods, 1e-3)))) == count, name
        assert one.source and one.expected


def test_an_interval_over_seeds_is_students():
    estimate = over_seeds([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t of 2 degrees of freedom at 97.5 %
    assert over_seeds([1.0]).half is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    inside = [(e := over_seeds(random.normal(5.0, 2.0, 3))).low <= 5.0 <= e.high for _ in range(2000)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def answers(random, accuracy, seeds=3, items=200):
    return {"t": (random.random((seeds, items)) < accuracy).astype(float)}


def test_the_paired_bootstrap_finds_a_difference_and_no_other():
    random = np.random.default_rng(0)
    a, b = answers(random, 0.8), answers(random, 0.6)
    found = paired_bootstrap(a, b, 2000)
    assert found.shown
    assert found.mean == pytest.approx(a["t"].mean() - b["t"].mean())
    assert found.low < found.mean < found.high
    assert found.p < 0.05  # two degrees of freedom
    other = paired_bootstrap(b, a, 2000)
    assert other.mean == -found.mean
    same = paired_bootstrap(a, a, 500)
    assert (same.mean, same.low, same.high, same.shown) == (0, 0, 0, False)
    false = [paired_bootstrap(answers(random, 0.7), answers(random, 0.7), 300).shown for _ in range(60)]
    assert np.mean(false) < 0.15
    with pytest.raises(ValueError, match="different items"):
        paired_bootstrap(a, {"t": a["t"][:, :9]}, 100)


def test_p_values_are_corrected_for_their_number():
    """Holm's own arithmetic: the smallest of four times 4, the next times 3 …, never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("corrected", "words"), [(0.04, "is better than"), (0.06, "no difference shown")])
def test_a_verdict_is_by_the_corrected_p(corrected, words):
    """An interval that leaves out 0 alone does not do, in words as in the table."""
    difference = paired_difference([1.0, 1.1, 1.2], [1.2, 1.31, 1.41])
    assert difference.shown
    pair = Pair("dora r4", "lora r4", "eval_loss", difference, corrected, 0.01, 0.95)
    assert words in pair.words
    table = pair_table(Summary([], [pair], {}, [], "eval_loss", 0.95, ""))
    assert (table.rows[0][-1] == "not shown") == (words == "no difference shown")


def test_the_smallest_visible_difference_is_found_four_times_in_five():
    """By simulation: true differences of that size, on seeds with that spread."""
    random, seeds, spread = np.random.default_rng(3), 5, 0.02
    sizes, shown = [], []
    for _ in range(400):
        noise = random.normal(0, spread, seeds)
        size = paired_difference(spread * np.array([-1.2, -0.4, 0.0, 0.4, 1.2]), [0.0] * seeds).visible()
        sizes.append(size)
        shown.append(paired_difference(size + noise, [0.0] * seeds).shown)
    assert 0.7 < np.mean(shown) < 0.9
    found = paired_difference([1.0, 1.1, 1.3], [1.2, 1.3, 1.4])
    assert found.visible(10) > found.visible(2) > found.visible() > 0


def test_pairing_removes_what_both_share():
    """Items of very different difficulty: unpaired, the same difference would drown."""
    random = np.random.default_rng(1)
    hard = random.random(300) < 0.5
    a = {"t": np.tile(hard, (3, 1)).astype(float)}
    b = {"t": a["t"].copy()}
    b["t"][:, np.flatnonzero(hard)[:15]] = 0  # 15 items lost, nothing gained
    assert paired_bootstrap(a, b, 1000).shown


def test_the_mean_over_tasks_weighs_tasks_not_items():
    a = {"large": np.ones((2, 90)), "small": np.zeros((2, 10))}
    b = {"large": np.zeros((2, 90)), "small": np.zeros((2, 10))}
    assert paired_bootstrap(a, b, 100).mean == pytest.approx(0.5)


def test_paired_losses():
    found = paired_difference([1.0, 1.1, 1.2], [1.2, 1.31, 1.41])
    assert found.mean == pytest.approx(-0.20666667)
    assert found.shown
    assert found.p < 0.01


@pytest.fixture(scope="module")
def setup(tiny_folder, tmp_path_factory):
    """A grid of six cells on the tiny model: two methods, two learning rates, two seeds."""
    folder = tmp_path_factory.mktemp("grid")
    settings = shared(tiny_folder, max_steps=3, batch_size=4, dtype="float32", tasks_limit=12, tasks_protocol="likelihood")
    settings |= {"tensorboard": False, "limit": 40, "log_steps": 1, "save_steps": 1}
    values = {"settings": settings, "methods": ["lora", "dora"], "ranks": [4], "lrs": [1e-3, 1e-2], "seeds": [0, 1]}
    values |= {"analyze": ["q_proj"], "resamples": 500}
    (folder / "grid.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def whole(setup):
    """The grid, run in one go."""
    output = setup / "whole"
    assert main(["compare", str(setup / "grid.yaml"), "--output", str(output)]) == 0
    return output


def figures(output):
    """What a grid says, without times and memory."""
    found = json.loads((output / "compare.json").read_text())
    for row in found["rows"]:
        for name in ("seconds", "cpu_seconds", "peak_bytes", "tokens_per_second"):
            row.pop(name)
    return {key: found[key] for key in ("rows", "pairs", "lrs")}


def test_a_grid_ends_with_tables(whole, capsys):
    found = figures(whole)
    assert [(r["method"], r["rank"], r["seeds"]) for r in found["rows"]] == [("lora", 4, [0, 1]), ("dora", 4, [0, 1])]
    for row in found["rows"]:
        assert set(row["scores"]) == {"likelihood", "eval_loss"}
        assert row["scores"]["likelihood"]["low"] is not None
        cells = [whole / "cells" / f"{row['method']}-r4-lr{row['lr']:g}-s{seed}" for seed in (0, 1)]
        losses = [json.loads((cell / "metrics.json").read_text())["eval_loss"] for cell in cells]
        assert row["scores"]["eval_loss"]["mean"] == pytest.approx(np.mean(losses))
        rights = [json.loads((cell / "scores" / "after" / "results.json").read_text())["results"][0]["accuracy"] for cell in cells]
        assert row["scores"]["likelihood"]["mean"] == pytest.approx(np.mean(rights))
        assert row["lr"] == 1e-2  # three steps: the larger rate has the lower loss, by far
    assert {p["score"] for p in found["pairs"]} == {"likelihood", "eval_loss"}
    assert (whole / "base" / "results.json").is_file()
    assert not list(whole.glob("cells/*/checkpoint-*/optimizer.pt"))
    assert len(list((whole / "cells").iterdir())) == 6
    assert json.loads((whole / "analysis" / "points.json").read_text()).keys() == {
        str(whole / "cells" / f"{row['method']}-r4-lr{row['lr']:g}-s0") for row in found["rows"]
    }
    page = (whole / "report.html").read_text()
    for words in ("Scores and cost", "Differences", "lora-r4-lr0.01-s1", "mean over seeds", "base model"):
        assert words in page, words


def test_a_finished_grid_runs_nothing_again(whole, setup, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.glob("cells/*/metrics.json")}
    assert main(["compare", str(setup / "grid.yaml"), "--output", str(whole), "--json"]) == 0
    out = capsys.readouterr().out
    assert "finished" not in out
    losses = {p.parent: json.loads(p.read_text())["eval_loss"] for p in whole.glob("cells/*/metrics.json")}
    best = min(losses, key=losses.get)
    (line,) = [line for line in out.splitlines() if line.startswith("next: ")]
    assert f"doratune merge --adapter {best}/adapter " in line and f"doratune report {best}" in line
    assert {p: p.stat().st_mtime_ns for p in whole.glob("cells/*/metrics.json")} == before
    assert json.loads(out.strip().splitlines()[-1])["output"] == str(whole)
    assert main(["compare", str(setup / "grid.yaml"), "--output", str(whole), "--dry_run"]) == 0
    assert "every cell has run" in capsys.readouterr().out


def test_killed_and_started_again_it_ends_with_the_same_table(whole, setup, capsys):
    """SIGKILL in the middle of a cell, SIGTERM in another: the third start finishes it: one method, its sweep and a seed more."""
    output = setup / "killed"
    words = ["compare", str(setup / "grid.yaml"), "--output", str(output), "--methods", "[lora]"]
    for number, cells, status in ((signal.SIGKILL, 1, -9), (signal.SIGTERM, 2, 128 + signal.SIGTERM)):
        command = [sys.executable, "-m", "doratune.cli", *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 600
        while len(list(output.glob("cells/*/checkpoint-*"))) < cells and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, number)
        assert process.wait(60) == status
        deadline = time.monotonic() + 600  # a cell that outlives a killed grid writes its checkpoint and ends
        while time.monotonic() < deadline and main([*words, "--dry_run"]):
            time.sleep(0.2)
        assert len(list(output.glob("cells/*/metrics.json"))) < 3
    for _ in range(100):
        capsys.readouterr()
        if main(words) == 0:
            break
        assert "is in use by another doratune compare" in capsys.readouterr().err
        time.sleep(0.5)
    expected, found = figures(whole), figures(output)
    (expected_row,) = (row for row in expected["rows"] if row["method"] == "lora")
    assert found["rows"] == [expected_row] and len(list((output / "cells").iterdir())) == 3
    assert found["lrs"] == {name: rates for name, rates in expected["lrs"].items() if "lora" in name}


def test_a_part_of_the_grid_on_ray(whole, setup, capsys):
    """A real cluster of this machine; the cells are the same commands."""
    pytest.importorskip("ray")
    output = setup / "ray"
    words = ["compare", str(setup / "grid.yaml"), "--output", str(output), "--launcher", "ray", "--cell_cpus", "1"]
    words += ["--analyze", "[]", "--methods", "[lora]", "--lrs", "[0.01]"]
    script = f"import sys; from doratune.cli.main import main, quiet_others; quiet_others(); sys.exit(main({words!r}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    pieces = [piece.strip() for piece in re.split(r"[\r\n]", run.stderr)]
    assert [piece for piece in pieces if piece and not piece.startswith("ray cells: ")] == [], "other packages' lines"
    (there,) = figures(output)["rows"]
    (here,) = (row for row in figures(whole)["rows"] if row["method"] == "lora")
    assert all(there[key] == here[key] for key in ("method", "rank", "seeds", "lr", "trainable"))
    # a worker runs with as many threads as CPUs were asked for: sums round differently
    assert there["scores"]["eval_loss"]["mean"] == pytest.approx(here["scores"]["eval_loss"]["mean"], rel=1e-4)


def test_ray_that_is_not_there_is_a_line(setup, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["compare", str(setup / "grid.yaml"), "--output", str(setup / "noray"), "--launcher", "ray"]) == 2
    assert "pip install 'doratune[cluster]'" in capsys.readouterr().err


def test_trouble_in_a_cell_is_a_line(whole, setup, capsys, tmp_path):
    import shutil

    output = tmp_path / "grid"
    shutil.copytree(whole, output)
    for path in output.rglob("recipe.yaml"):
        path.write_text(path.read_text().replace(str(whole), str(output)))
    lr = figures(whole)["lrs"]["dora"]
    bad = output / "cells" / f"dora-r4-lr{lr:g}-s1" / "metrics.json"
    bad.write_text("{broken")
    assert main(["compare", str(setup / "grid.yaml"), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert f"{bad} is not valid JSON" in out
    assert "dora r4: fewer than the grid's 2 seeds finished" in out
    assert bad.read_text() == "{broken"
    assert [r["seeds"] for r in figures(output)["rows"]] == [[0, 1], [0]]
    other = yaml.safe_load((setup / "grid.yaml").read_text())
    other["settings"]["weight_decay"] = 0.5
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    assert main(["compare", str(tmp_path / "other.yaml"), "--output", str(output)]) == 2
    assert "holds another grid (settings" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert main(["compare", str(setup / "grid.yaml"), "--output", str(tmp_path / "full")]) == 2
    assert "exists and holds no grid" in capsys.readouterr().err
