"""doratune compare: statistics under seed effects, and folders, grids and cells that are not as they should be."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from doratune.cli.arguments import parse
from doratune.cli.evaluate import EvaluateSettings
from doratune.comparison.cells import Cell, command, finals, folder_of, rates, recipe_of, refuse_mixed, shown, sweep
from doratune.comparison.collect import Result, collect
from doratune.comparison.grid import _record, _words, base_command
from doratune.comparison.rates import choose
from doratune.comparison.recipe import CompareRecipe
from doratune.comparison.statistics import paired_bootstrap
from doratune.comparison.summary import summarize
from doratune.errors import UserError
from doratune.report.page import build
from doratune.support.files import write_json
from doratune.training.recipe import TrainRecipe
from doratune.training.train import check_same, train, write_recipe


def test_seeds_that_differ_are_no_difference_between_methods():
    """Two methods of the same quality whose runs scatter by seed: at 95 %, at most one comparison in twenty may call one better."""
    random = np.random.default_rng(0)

    def answers(hard):
        chance = 1 / (1 + np.exp(-(hard[None] + random.normal(0, 0.5, (3, 1)))))
        return {"t": (random.random((3, 500)) < chance).astype(float)}

    found = []
    for _ in range(300):
        hard = random.normal(0, 2, 500)
        found.append(paired_bootstrap(answers(hard), answers(hard), 200).shown)
    assert np.mean(found) < 0.09  # 5 %, and 3 standard errors of 300 draws


def grid(settings=(), **more):
    values = {"model": "x", "data": "demo", "eval_size": 8, "tasks": ["demo"]} | dict(settings)
    return CompareRecipe(settings=values, **({"methods": ["lora"]} | more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"methods": ["dora_half"], "ranks": [1, 2]}, "dora_half runs at rank 1 for two of [1, 2]"),
        (
            {"methods": ["x", "x-r4"], "ranks": [4], "variants": {"x": {"method": "dora"}, "x-r4": {"method": "full"}}},
            "share the folder",
        ),
        ({"methods": ["../x"], "variants": {"../x": {"method": "dora"}}}, "'../x' names folders"),
        ({"methods": ["v"], "variants": {"v": {"method": "dorra"}}}, "v: method is 'dorra'; expected one of dora"),
        ({"methods": ["v"], "ranks": [4], "variants": {"v": {"method": "dora", "rank_factor": 0}}}, "rank_factor is 0"),
        ({"method_lrs": {"lora": [1e-3, 1e-3]}}, "expected positive numbers, each once"),
        ({"method_lrs": {"lora": [-1.0, 1.0]}}, "expected positive numbers, each once"),
        ({"method_lrs": {"lora": ["a"]}}, "expected positive numbers, each once"),
        ({"method_lrs": {"lora": 1e-3}}, "lora has 0.001; expected a list"),
        ({"settings": {"quantize": "nf4"}, "methods": ["dora", "full"]}, "full: method full trains a dense base"),
        ({"settings": {"eval_size": "many"}}, "eval_size is 'many'; expected a whole number"),
        ({"settings": {"tasks": "demo"}}, "tasks is 'demo'; expected a list"),
        ({"seeds": [-1]}, "seed is -1; expected"),
    ],
)
def test_a_grid_that_cannot_be_is_a_line(more, message):
    """Before: cells counted twice (false seeds), cells in one folder, folders outside the grid's, tracebacks."""
    one = grid(**more)
    with pytest.raises(UserError) as error:
        refuse_mixed(one, one.check())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_learning_rates_that_print_alike_have_folders_of_their_own():
    one = grid(lrs=[1e-3, 1.0000001e-3])
    assert len({cell.name for cell in sweep(one, one.check())}) == 2


def test_yaml_numbers_without_a_point_are_numbers():
    assert grid({"lr": "1e-3"}).check().lr == 1e-3


def test_a_variants_own_alpha_stands():
    one = grid({"alpha": 32.0}, methods=["v"], variants={"v": {"method": "dora", "alpha": 64.0}})
    assert recipe_of(finals(one, one.check(), rates(one, one.check(), {"v": 1e-3}))[0], one, one.check()).alpha == 64


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": None},
        {"mirror": None},
        {"baseline_targets": None},
        {"targets": ["a,b", "c: d"]},
        {"targets": r".*\\.(q|v)_proj$"},
        {"tasks": ["a b.json", "c, d.json"]},
        {"data": ["a.json", "b.json[:20]"]},
        {"rank_overrides": {"layers.0.q_proj": 4}},
        {"train_on_prompt": True},
        {"exclude": []},
    ],
)
def test_a_cells_command_says_its_recipe(settings, tmp_path):
    """What the command's words mean to doratune train is the recipe that the cell is compared with."""
    one = grid(methods=["v"], variants={"v": {"method": "dora"} | settings}, output=str(tmp_path / "out put"))
    shared = one.check()
    write_recipe(tmp_path / "out put" / "recipe.yaml", shared)
    for lr in (1e-5, 3.3333333333333335e-05):
        cell = finals(one, shared, rates(one, shared, {"v": lr}))[0]
        words = shlex.split(shown(command(cell, one, shared)))[2:]
        read, _ = parse(TrainRecipe, words, "train", "", recipe=True)
        assert dataclasses.asdict(read) == dataclasses.asdict(recipe_of(cell, one, shared))


@pytest.mark.parametrize(
    "settings",
    [
        {"images": "some pictures/"},
        {"prompt": "template"},
        {"prompt": "published"},
        {"tasks": ["a b.json", "c, d.json"]},
        {"device": "cpu", "dtype": "float32"},
        {"trust_remote_code": True, "quantize": "nf4"},
        {"tasks_limit": 7, "tasks_batch_size": 3, "mirror": "http://x/{y}"},
    ],
)
def test_the_base_is_scored_as_the_cells_are(settings):
    """What the words mean to doratune evaluate is how a run of the recipe scores its result."""
    one = grid({"tasks_protocol": "generate"} | settings, score="generate")
    shared = one.check()
    read, _ = parse(EvaluateSettings, base_command(shared)[1:], "evaluate", "")
    same = ("model", "dtype", "device", "quantize", "images", "mirror", "trust_remote_code")
    assert [getattr(read, name) for name in same] == [getattr(shared, name) for name in same]
    scored = (read.task, read.limit, read.batch_size, read.protocol)
    assert scored == (shared.tasks, shared.tasks_limit, shared.tasks_batch_size, "generate")
    assert read.prompt == ("template" if shared.prompt == "template" else "plain")


@pytest.fixture(scope="module")
def finished_grid(tmp_path_factory):
    """A grid as it is when its cells have run: two methods, three seeds."""
    output = tmp_path_factory.mktemp("grid") / "out"
    one = grid({"tasks_protocol": "likelihood"}, methods=["lora", "dora"], ranks=[4], output=str(output), resamples=100)
    shared = one.check()
    random = np.random.default_rng(0)
    write_recipe(output / "recipe.yaml", shared)
    for cell in finals(one, shared, rates(one, shared, dict.fromkeys(one.methods, 1e-3))):
        folder = folder_of(cell, one)
        write_recipe(folder / "recipe.yaml", recipe_of(cell, one, shared))
        right = [bool(x) for x in random.random(8) < 0.5]
        items = [{"prompt": f"q{i}", "gold": "true", "output": "", "correct": x} for i, x in enumerate(right)]
        write_items(folder / "scores" / "after" / "demo.likelihood.jsonl", items)
        result = {"task": "demo", "protocol": "likelihood", "right": sum(right), "total": 8}
        write_json(folder / "scores" / "after" / "results.json", {"results": [result], "averages": []})
        figures = {"trainable": 10, "total": 100, "seconds": 1.0, "tokens_per_second": 5.0, "eval_loss": 2.0, "log": []}
        write_json(folder / "metrics.json", figures)
    return output


def write_items(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.json", "{}", "trainable is missing"),
        ("metrics.json", '{"trainable": "x"}', "trainable is 'x'"),
        ("metrics.json", '{"trainable": ' + "9" * 400 + "}", "trainable is 999"),
        ("metrics.json", '{"trainable": ' + "9" * 5000 + "}", "not valid JSON"),
        ("metrics.json", "[" * 100_000 + "]" * 100_000, "not valid JSON"),
        ("scores/after/results.json", "{}", "holds no whole results"),
        ("scores/after/results.json", '{"results": [1]}', "holds no whole results"),
        ("scores/after/results.json", '{"results": [{"task": "demo"}]}', "holds no whole results"),
        ("scores/after/demo.likelihood.jsonl", '{"correct": "no"}\n' * 8, "is missing or corrupt"),
        ("scores/after/demo.likelihood.jsonl", '{"correct": true, "prompt": "o", "gold": "a"}\n' * 8, "other items of demo"),
        ("recipe.yaml", "a: &a [*a]\n", "is missing or corrupt"),
        ("recipe.yaml", BOMB, "is missing or corrupt"),
        ("recipe.yaml", "a: " + "[" * 3000 + "]" * 3000, "is missing or corrupt"),
    ],
)
def test_a_corrupt_cell_is_a_line_and_the_rest_comes_out(finished_grid, tmp_path, file, text, message):
    """In the comparison and on the page."""
    shutil.copytree(finished_grid, tmp_path / "out")
    one = grid({"tasks_protocol": "likelihood"}, methods=["lora", "dora"], ranks=[4], output=str(tmp_path / "out"), resamples=100)
    shared = one.check()
    lrs = rates(one, shared, dict.fromkeys(one.methods, 1e-3))
    (tmp_path / "out" / "cells" / "lora-r4-lr0.001-s0" / file).write_text(text)
    results, problems = collect(finals(one, shared, lrs), one, shared)
    assert len(problems) == 1
    assert message in problems[0]
    assert {row.name: row.seeds for row in summarize(one, shared, results, lrs, problems).rows} == {
        "lora r4": [1, 2],
        "dora r4": [0, 1, 2],
    }
    facts = build([tmp_path / "out"], tmp_path / "page.html", analysis="none", say=lambda line: None)
    assert len(facts["runs"]) == 6


def test_a_loss_that_is_no_number_is_left_out(finished_grid, tmp_path):
    shutil.copytree(finished_grid, tmp_path / "out")
    path = tmp_path / "out" / "cells" / "lora-r4-lr0.001-s0" / "metrics.json"
    path.write_text(path.read_text().replace('"eval_loss": 2.0', '"eval_loss": NaN'))
    for score, seeds in (("likelihood", [0, 1, 2]), ("eval_loss", [1, 2])):
        settings = {"tasks_protocol": "likelihood"}
        one = grid(settings, methods=["lora", "dora"], ranks=[4], output=str(tmp_path / "out"), resamples=100, score=score)
        shared = one.check()
        lrs = rates(one, shared, dict.fromkeys(one.methods, 1e-3))
        results, problems = collect(finals(one, shared, lrs), one, shared)
        summary = summarize(one, shared, results, lrs, problems)
        assert next(row.seeds for row in summary.rows if row.method == "lora") == seeds
        assert json.dumps(summary.to_dict(), allow_nan=False)


def test_a_method_whose_sweep_failed_is_left_out(finished_grid, tmp_path):
    """Its loss was NaN at every rate, say: a line, and the others' tables."""
    shutil.copytree(finished_grid, tmp_path / "out")
    one = grid(
        {"tasks_protocol": "likelihood"}, methods=["lora", "dora"], ranks=[4], output=str(tmp_path / "out"), lrs=[1e-3, 1e-2]
    )
    for folder in (tmp_path / "out" / "cells").glob("lora-*"):
        shutil.rmtree(folder)
    lrs, notes = choose(one, one.check())
    assert lrs == {("dora", 4): 1e-3}
    assert any("lora: no learning rate of its sweep finished, so it is left out" in note for note in notes)
    assert {cell.method for cell in finals(one, one.check(), lrs)} == {"dora"}
    shutil.rmtree(tmp_path / "out" / "cells")
    with pytest.raises(UserError, match="no cell of the sweep finished"):
        choose(one, one.check())


def test_a_cell_goes_on_only_in_its_own_recipe(tmp_path):
    """A checkpoint of other data, begun before the grid was changed, is not resumed."""
    one = grid(output=str(tmp_path / "out"))
    shared = one.check()
    cell = finals(one, shared, rates(one, shared, {"lora": 1e-3}))[0]
    folder = folder_of(cell, one)
    write_recipe(folder / "recipe.yaml", recipe_of(cell, one, shared))
    write_json(folder / "checkpoint-1" / "trainer_state.json", {})
    assert _words(cell, one, shared)[-1] == "--resume"
    other = grid({"data": "other.json"}, output=str(tmp_path / "out"))
    assert _words(cell, other, other.check())[-1] == "--overwrite"


def test_scores_of_the_base_model_on_other_tasks_go(tmp_path):
    one = grid(output=str(tmp_path / "out"))
    _record(one, one.check())
    write_json(tmp_path / "out" / "base" / "results.json", {})
    _record(one, one.check())
    assert (tmp_path / "out" / "base").is_dir()
    other = grid({"tasks": ["boolq"]}, output=str(tmp_path / "out"))
    _record(other, other.check())
    assert not (tmp_path / "out" / "base").exists()


def test_a_run_that_starts_over_is_unfinished(tiny_folder, tmp_path):
    """--overwrite of a finished run that then stops must not look finished, with figures of the old run."""
    recipe = {
        "model": str(tiny_folder),
        "data": "demo",
        "limit": 8,
        "max_steps": 1,
        "output": str(tmp_path / "run"),
        "tensorboard": False,
    }
    train(TrainRecipe(**recipe), lambda line: None)
    assert (tmp_path / "run" / "metrics.json").is_file()

    def stop(model, tokenizer):
        raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        train(TrainRecipe(**recipe, lr=1e-2, overwrite=True), lambda line: None, score=stop)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_worker_of_ray_that_dies_is_one_failed_cell(tmp_path):
    pytest.importorskip("ray")
    script = (
        "import sys\n"
        "from doratune.comparison import launch\n"
        "launch.program = lambda words: [sys.executable, '-c', words[0]]\n"
        "jobs = [('bad', ['import os; os.kill(os.getppid(), 9)'], 'logs/bad'), ('good', ['print(1)'], 'logs/good')]\n"
        "launch.run_on_ray(jobs, lambda name, status: print('ended', name, status, flush=True), None, 1, 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert {line for line in run.stdout.splitlines() if line.startswith("ended")} == {"ended bad -9", "ended good 0"}, run.stderr[
        -900:
    ]


@pytest.mark.parametrize("other", [{"data": "other.json"}, {"eval_size": 2}, {"limit": 20}, {"eval_data": "e.json"}])
def test_resuming_with_other_examples_is_refused(tmp_path, other):
    before = {"data": "demo", "eval_size": 8, "limit": 10}
    write_recipe(tmp_path / "recipe.yaml", TrainRecipe(**before))
    check_same(TrainRecipe(**before), tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=f"--resume with another {next(iter(other))}"):
        check_same(TrainRecipe(**before | other), tmp_path / "recipe.yaml")


def test_what_a_reader_must_know_is_a_note():
    """A size that the data does not have, and a loss that was chosen by."""
    one = grid(sizes=[2000], seeds=[0], lrs=[1e-3, 1e-2], score="eval_loss")
    training, cell = one.check(), Cell("lora", 16, 2000, 1e-3, 0)
    figures = {"eval_loss": 1.0, "trainable": 1, "total": 2, "seconds": 1.0, "tokens_per_second": 1.0, "examples": 1192}
    notes = summarize(one, training, [Result(cell, figures)], {("lora", 16): 1e-3}, []).notes
    assert f"{cell.name}: the data holds 1192 examples for training, not 2000" in notes
    assert any("chosen by the loss that is shown" in note for note in notes)
    assert any("1 seed: take at least three" in note for note in notes)
    fine = summarize(
        grid(sizes=[2000], seeds=[0]), training, [Result(cell, figures | {"examples": 2000})], {("lora", 16): 1e-3}, []
    ).notes
    assert not any("holds" in note or "chosen by" in note for note in fine)
