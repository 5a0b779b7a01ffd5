"""A resumed run is the run that it was: what its recipe says is what was trained, or it is refused."""

import dataclasses
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from doratune.cli.main import main
from doratune.errors import UserError
from doratune.training.recipe import TrainRecipe
from doratune.training.resume import FREE, check_same

OTHER = {
    "lr": "1e-6", "weight_decay": "0.1", "output_factor_lr_ratio": "4", "optimizer": "sgd", "magnitude_lr_ratio": "0.5",
    "schedule": "cosine", "warmup_steps": "2", "max_grad_norm": "0.5", "batch_size": "2", "gradient_accumulation": "2", "seed": "7",
    "max_length": "64", "too_long": "skip", "train_on_prompt": "true", "group_by_length": "false", "dropout": "0.5", "rank": "2",
    "dtype": "bfloat16", "checkpointing": "reentrant", "eval_size": "4", "data_format": "instruction", "bad_items": "skip",
}  # fmt: skip
"""Settings that shape the training, each with another value than the run had."""


@pytest.fixture(scope="module")
def start(tiny_folder, tmp_path_factory):
    """(the words of a run, its folder after two steps)."""
    folder = tmp_path_factory.mktemp("resume")
    items = [{"instruction": f"Is {n} even?", "output": ("true", "false")[n % 2]} for n in range(8)]
    (folder / "data.json").write_text(json.dumps(items))
    words = ["train", "--model", str(tiny_folder), "--data", str(folder / "data.json"), "--rank", "4", "--lr", "1e-3"]
    words += ["--batch_size", "4", "--dtype", "float32", "--tensorboard", "false", "--schedule", "constant", "--log_steps", "1"]
    words += ["--dropout", "0.1"]
    assert main([*words, "--output", str(folder / "run")]) == 0
    return words, folder / "run"


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", OTHER)
def test_another_setting_is_refused_and_nothing_is_touched(name, start, capsys):
    words, run = start
    before = contents(run)
    assert main([*words, "--output", str(run), "--resume", f"--{name}", OTHER[name]]) == 2
    error = capsys.readouterr().err.strip()
    assert f"recipe.yaml: --resume with another {name} " in error and "start a new run" in error and "\n" not in error
    assert contents(run) == before


def test_every_setting_is_held_or_free(tmp_path):
    """A setting that a later version adds is held unless it is listed."""
    recipe = TrainRecipe(data="x")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    check_same(recipe, tmp_path / "recipe.yaml")
    for f in dataclasses.fields(recipe):
        other = dataclasses.replace(recipe, **{f.name: "other"})
        if f.name in FREE:
            check_same(other, tmp_path / "recipe.yaml")
        elif f.name not in ("epochs", "max_steps"):
            with pytest.raises(UserError, match=f"another {f.name} "):
                check_same(other, tmp_path / "recipe.yaml")


@pytest.mark.parametrize("longer", [["--epochs", "2"], ["--epochs", "2.5"], ["--max_steps", "5"]])
def test_a_longer_run_under_a_constant_schedule_is_the_run_of_that_length(longer, start, tmp_path):
    words, _ = start
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    first = ["--max_steps", "2"] if "--max_steps" in longer else []
    assert main([*words, "--output", str(parts), *first]) == 0
    assert json.loads((parts / "metrics.json").read_text())["steps"] == 2
    assert main([*words, "--output", str(parts), "--resume", *longer]) == 0
    assert main([*words, "--output", str(whole), *longer]) == 0
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (parts, whole))
    assert a["steps"] == b["steps"] > 3
    assert [row["loss"] for row in a["log"]] == [row["loss"] for row in b["log"]]
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (parts, whole))
    assert all(torch.equal(a[key], b[key]) for key in b)
    recorded = yaml.safe_load((parts / "recipe.yaml").read_text())
    assert recorded[longer[0][2:]] == yaml.safe_load(longer[1])


def test_another_length_is_refused_where_it_cannot_be_the_same_run(start, tmp_path, capsys):
    words, run = start
    assert main([*words, "--output", str(run), "--resume", "--epochs", "0.5"]) == 2
    assert "epochs 1.0 -> 0.5" in capsys.readouterr().err
    linear = tmp_path / "linear"
    assert main([*words, "--output", str(linear), "--schedule", "linear"]) == 0
    assert main([*words, "--output", str(linear), "--schedule", "linear", "--resume", "--epochs", "2"]) == 2
    error = capsys.readouterr().err
    assert "epochs 1.0 -> 2.0; only a longer run under schedule constant goes on (here linear)" in error


def test_what_only_reports_or_saves_may_change(start, capsys):
    words, run = start
    free = ["--log_steps", "5", "--save_steps", "1", "--keep_checkpoints", "3", "--tasks", "[demo]", "--tasks_limit", "2"]
    assert main([*words, "--output", str(run), "--resume", *free, "--tasks_protocol", "likelihood"]) == 0
    assert (run / "scores" / "after" / "results.json").is_file()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["keep_checkpoints"] == 3


@pytest.mark.parametrize("content", ["", "[1, 2]", "rank: [4", None])
def test_a_run_without_its_record_is_not_resumed(content, start, tmp_path, capsys):
    import shutil

    words, run = start
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "recipe.yaml").unlink() if content is None else (copy / "recipe.yaml").write_text(content)
    assert main([*words, "--output", str(copy), "--resume"]) == 2
    assert "recipe.yaml" in capsys.readouterr().err
