"""doratune init: recipes that run as they are, numbers that follow from the data and the memory, and what is refused."""

import json
import os
import pty
import subprocess
import sys

import pytest
import yaml
from conftest import tiny_gpt2, tiny_llama

from doratune.cli.main import main
from doratune.planning import Planner, PlanSettings
from doratune.planning.start import RESERVE, DataFacts, RunWish, start_of
from doratune.training.recipe import TrainRecipe

DATA = {
    "instruction": lambda i: {"instruction": f"Is {i} even?", "output": "true" if i % 2 == 0 else "false"},
    "chat": lambda i: {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]},
    "completion": lambda i: {"prompt": f"{i} + 1 =", "completion": f" {i + 1}"},
    "text": lambda i: {"text": f"number {i} follows number {i - 1}"},
}


def written(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def init(*words, folder, data, output):
    return main(["init", str(data), "--model", str(folder), "--output", str(output), *words])


@pytest.mark.parametrize("kind", DATA)
def test_the_recipe_runs_as_it_is(kind, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / f"{kind}.jsonl", [DATA[kind](i) for i in range(24)])
    assert init(folder=tiny_folder, data=f"{kind}.jsonl", output="recipe.yaml") == 0
    assert "| doratune train recipe.yaml" in capsys.readouterr().out
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["output"] == f"runs/{kind}" and recipe["method"] == "dora" and recipe["alpha"] == 2 * recipe["rank"]
    assert recipe.get("prompt") == (None if kind in ("chat", "text") else "template")
    assert main(["train", "--config", "recipe.yaml", "--max_steps", "2"]) == 0
    assert (tmp_path / "runs" / kind / "adapter" / "adapter_config.json").is_file()


def test_every_number_has_its_reason_above_it(tiny_folder, tmp_path):
    data = written(tmp_path / "d.jsonl", [DATA["chat"](i) for i in range(24)])
    assert init(folder=tiny_folder, data=data, output=tmp_path / "r.yaml") == 0
    lines = (tmp_path / "r.yaml").read_text().splitlines()
    recipe = yaml.safe_load("\n".join(lines))
    TrainRecipe(**recipe).check()
    for name in (
        "rank",
        "lr",
        "targets",
        "batch_size",
        "gradient_accumulation",
        "max_length",
        "quantize",
        "epochs",
        "warmup_steps",
    ):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
        assert lines[at - 1].startswith("# "), name


@pytest.mark.parametrize("how", ["short", "long", "text"])
def test_the_length_is_that_of_the_data(how, tiny_folder, tmp_path, capsys):
    words = {"short": [2] * 99 + [40], "long": [20] * 90 + [30] * 10, "text": [400] * 20}[how]
    make = (lambda n: {"text": "word " * n}) if how == "text" else (lambda n: {"prompt": "word " * n, "completion": "yes"})
    data = written(tmp_path / "d.jsonl", [make(n) for n in words])
    main(["data", data, "--model", str(tiny_folder), "--json", *(["--prompt", "template"] if how != "text" else [])])
    lengths = json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]["tokens"]
    assert init("--json", folder=tiny_folder, data=data, output=tmp_path / "r.yaml") == 0
    chosen = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["max_length"]
    if how == "text":
        assert chosen == 256  # the positions of the model; a text is divided
    else:
        assert lengths["99 %"] <= chosen < lengths["99 %"] + 64 and chosen % 64 == 0


FACTS = DataFacts(examples=1000, usual=200, longest=400)


def needed(folder, **settings):
    """GiB of a plan, with what a start leaves free."""
    values = {"model": folder, "max_length": 256, "batch_size": 16, "device": "cpu", "largest": "none"}
    return Planner(PlanSettings(**values | settings)).plan().total / 2**30 / (1 - RESERVE)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A config whose runs differ in memory: a large vocabulary."""
    folder = tmp_path_factory.mktemp("wide")
    config = tiny_llama(layers=1).config
    config.vocab_size, config.hidden_size, config.intermediate_size = 30_000, 256, 1024
    config.save_pretrained(folder)
    return str(folder)


def test_what_does_not_fit_is_split_then_recomputed(wide):
    """Memories between the plans of two neighbouring changes: the plan decides, not a formula of ours."""
    whole, part = needed(wide), needed(wide, batch_size=8, gradient_accumulation=2)
    settings = start_of(RunWish(wide, whole + 0.01, "cpu"), FACTS).choices
    assert (settings["batch_size"].value, settings["checkpointing"].value, settings["quantize"].value) == (16, "none", "none")
    settings = start_of(RunWish(wide, (whole + part) / 2, "cpu"), FACTS).choices
    assert (settings["batch_size"].value, settings["gradient_accumulation"].value) == (8, 2)
    plan = start_of(RunWish(wide, (whole + part) / 2, "cpu"), FACTS).plan
    assert plan.fits and plan.total <= (whole + part) / 2 * (1 - RESERVE) * 2**30


def test_a_base_that_does_not_fit_is_packed(wide):
    """Dense takes more than NF4 by half of a block's weights; where no dense run fits, QDoRA does."""
    dense = needed(wide, batch_size=1, gradient_accumulation=16, checkpointing="non-reentrant")
    packed = needed(wide, batch_size=1, gradient_accumulation=16, checkpointing="non-reentrant", quantize="nf4")
    assert packed < dense
    start = start_of(RunWish(wide, (dense + packed) / 2, "cpu"), FACTS)
    assert start.choices["quantize"].value == "nf4" and "QDoRA" in start.choices["quantize"].reason


def test_a_memory_that_nothing_fits_in_names_the_least(wide, tmp_path, capsys, tiny_folder):
    from doratune import UserError

    with pytest.raises(UserError, match=r"memory is 0.1 GiB; .* needs (\d+\.\d+) GiB: give --memory") as error:
        start_of(RunWish(wide, 0.1, "cpu", quantize="none"), FACTS)
    least = float(str(error.value).split("--memory ")[1].split(",")[0])
    assert start_of(RunWish(wide, least, "cpu", quantize="none"), FACTS).plan.fits
    data = written(tmp_path / "d.jsonl", [DATA["chat"](i) for i in range(8)])
    assert init("--memory", "0.01", folder=tiny_folder, data=data, output=tmp_path / "r.yaml") == 2
    assert "give --memory" in capsys.readouterr().err and not (tmp_path / "r.yaml").exists()


@pytest.mark.parametrize(("examples", "together", "epochs"), [(20_000, 16, 1), (1000, 16, 3), (100, 4, 3), (5, 4, 3)])
def test_few_examples_still_make_steps(examples, together, epochs, wide):
    choices = start_of(RunWish(wide, 8, "cpu"), DataFacts(examples, 60, 90)).choices
    assert (choices["batch_size"].value, choices["epochs"].value) == (together, epochs)


def test_several_devices_share_the_base_and_the_batch(wide):
    choices = start_of(RunWish(wide, 8, "cuda", processes=2), FACTS).choices
    assert choices["fsdp"].value == "shard" and choices["processes"].value == 2 and choices["batch_size"].value % 2 == 0


def test_other_architectures(tmp_path):
    """Layers of another kind and a smaller side than the usual rank."""
    model = tiny_gpt2()
    model.config.n_embd = 12
    model.config.save_pretrained(tmp_path)
    choices = start_of(RunWish(str(tmp_path), 8, "cpu"), FACTS).choices
    assert choices["rank"].value == 12 and choices["max_length"].value == 128


BAD = [
    (["--model", "no/such/model"], "no such model folder"),
    (["--model", "owner/name"], "cannot load owner/name"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--output", "recipe.json"], "ends in .yaml"),
    (["--output", "old.yaml"], "old.yaml exists"),
    (["--output", "old.yaml", "--overwrite"], "no recipe of doratune init"),
    (["--data", "pairs.jsonl"], "preference pairs"),
    (["--data_format", "chta"], "did you mean 'chat'"),
    (["--max_length", "0"], "max_length is 0"),
    (["--memory", "nan"], "memory is 'nan'; expected a number, 0 or more"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_what_is_refused_is_one_line_and_nothing_is_written(flags, message, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "d.jsonl", [DATA["chat"](i) for i in range(8)])
    written(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    (tmp_path / "old.yaml").write_text("model: mine\n")
    given = {"--model": str(tiny_folder), "--data": "d.jsonl"} | dict(zip(flags[::2], [*flags[1::2], "true"]))
    assert main(["init", *(word for pair in given.items() for word in pair)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "recipe.yaml").exists() and (tmp_path / "old.yaml").read_text() == "model: mine\n"


def test_items_that_cannot_be_used_are_left_out_and_said(tiny_folder, tmp_path, capsys):
    items = [DATA["chat"](i) for i in range(12)] + [{"messages": [{"role": "usr", "content": "x"}]}]
    data = written(tmp_path / "d.jsonl", items)
    assert init(folder=tiny_folder, data=data, output=tmp_path / "r.yaml") == 0
    assert "1 items cannot be used" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["bad_items"] == "skip"


def test_a_recipe_of_its_own_is_replaced_when_asked(tiny_folder, tmp_path):
    data = written(tmp_path / "d.jsonl", [DATA["chat"](i) for i in range(8)])
    for flags, status in (([], 0), ([], 2), (["--overwrite"], 0)):
        assert init(*flags, folder=tiny_folder, data=data, output=tmp_path / "r.yaml") == status


def test_without_a_terminal_nothing_is_asked(tiny_folder, capsys):
    assert main(["init", "--model", str(tiny_folder)]) == 2
    assert "data is not set" in capsys.readouterr().err


def test_in_a_terminal_what_is_missing_is_asked(tiny_folder, tmp_path):
    data = written(tmp_path / "d.jsonl", [DATA["chat"](i) for i in range(8)])
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "doratune", "init", "--output", str(tmp_path / "r.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(words, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    os.write(ours, f"{tiny_folder}\n{data}\n8\n".encode())
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert b"memory of the device" in error and b"recipe written" in out
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["data"] == data
