"""An output that is, holds or lies in an input is refused; `--overwrite` replaces only what doratune wrote."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_llama

import doratune
from doratune.cli.main import main


@pytest.fixture(scope="module")
def original(tiny_folder, tmp_path_factory):
    """home/base, home/run with an adapter and a recipe, home/data/items.json."""
    home = tmp_path_factory.mktemp("original") / "home"
    shutil.copytree(tiny_folder, home / "base")
    model = tiny_llama()
    model.config._name_or_path = "base"
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    doratune.save(randomize(model), home / "run" / "adapter")
    (home / "run" / "recipe.yaml").write_text("model: base\ndata: data/items.json\noutput: run\n")
    (home / "data").mkdir()
    items = [{"instruction": f"Is {i} even?", "input": "", "output": "true", "answer": "true"} for i in range(8)]
    (home / "data" / "items.json").write_text(json.dumps(items))
    return home


@pytest.fixture
def home(original, tmp_path, monkeypatch):
    shutil.copytree(original, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    os.symlink("base", "link")
    os.symlink(tmp_path / "home" / "run", "link_to_run")
    return tmp_path / "home"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


MERGE = ["merge", "--model", "base", "--adapter", "run/adapter"]
TRAIN = ["train", "--model", "base", "--data", "data/items.json", "--max_steps", "1", "--dtype", "float32"]
EVALUATE = ["evaluate", "--model", "base", "--adapter", "run/adapter", "--task", "data/items.json"]
ANALYZE = ["analyze", "run", "--model", "base"]
COMPARE = ["compare", "--settings", "{model: base, data: data/items.json, eval_size: 2}", "--score", "eval_loss"]
EXPORT = ["export", "--to", "lora-scale", "--model", "base", "--adapter", "run/adapter"]
GENERATE = ["generate", "--model", "base", "--adapter", "run/adapter"]
WITHOUT_OVERWRITE = ("compare",)

OVER = [
    *[
        (MERGE, output)
        for output in ("base", "./run/../base", "link", "base/new", "link/new", "run/adapter", "run", "link_to_run", ".")
    ],
    (["merge", "--adapter", "run/adapter"], "base"),
    *[(TRAIN, output) for output in ("base", "link", "base/run", "data", ".", "data/items.json/x")],
    *[(EVALUATE, output) for output in ("base", "run/adapter", "run/adapter/scores", "data", "run")],
    *[(ANALYZE, output) for output in ("run", "run/adapter", "run/adapter/points", "base", "link_to_run", ".")],
    *[(COMPARE, output) for output in ("base", "base/grid", "data")],
    (["report", "run"], "run"),
    *[(["report", "run"], f"run/{name}") for name in ("recipe.yaml", "metrics.json", "adapter/page.html", "adapter/doratune.json")],
    (["report", "run", "--analysis", "none"], "data/items.json"),
    (["bench", "--what", "decode", "--model", "base"], "base"),
    *[(EXPORT, output) for output in ("base", "link", "run/adapter", "run", "base/new")],
    *[(["export", "--model", "base"], output) for output in ("base", "link/new")],
    *[(["extract", "--model", "base", "--tuned", "base"], output) for output in ("base", "link", ".")],
    *[
        ([*GENERATE, "--prompts", "data/items.json"], output)
        for output in ("data/items.json", "run/adapter/x.jsonl", "base/x.jsonl")
    ],
]


@pytest.mark.parametrize(("words", "output"), OVER)
def test_inputs_stay(words, output, home, capsys):
    before = content(home)
    overwrite = [] if words[0] in (*WITHOUT_OVERWRITE, "bench") else ["--overwrite"]
    assert main([*words, "--output", output, *overwrite]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(f"doratune {words[0]}: "), error
    assert len([line for line in error if "Traceback" in line]) == 0
    assert content(home) == before


@pytest.mark.parametrize("case", ["BASE", "Base"])
def test_another_case_of_a_name_is_the_same_folder_where_the_disk_says_so(case, home):
    """A hard reading of `samefile`: where the file system folds case, so do we; where it does not, this is another folder."""
    same = Path(case).exists()
    assert main([*MERGE, "--output", case, "--overwrite"]) == (2 if same else 0)
    assert (home / "base" / "config.json").is_file()


@pytest.mark.parametrize("words", [MERGE, EVALUATE, ANALYZE])
def test_a_folder_of_others_is_never_emptied(words, home, capsys):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    assert main([*words, "--output", "mine", "--overwrite"]) == 2
    assert "mine holds thesis.txt, which no doratune command wrote there" in capsys.readouterr().err
    assert content(Path("mine")) == {"thesis.txt": b"mine"}


def test_another_model_is_never_replaced(home, capsys):
    """A folder with the very names that merge writes, which merge did not write."""
    shutil.copytree("base", "download")
    before = content(Path("download"))
    assert main([*MERGE, "--output", "download", "--overwrite"]) == 2
    assert "which no doratune command wrote there" in capsys.readouterr().err
    assert content(Path("download")) == before


def test_what_merge_wrote_is_replaced_and_what_came_later_is_not(home, capsys):
    os.symlink(home / "target", "output")  # a link stays a link
    assert main([*MERGE, "--output", "output"]) == 0
    whole = content(Path("output"))
    assert main([*MERGE, "--output", "output", "--overwrite"]) == 0
    assert content(Path("output")) == whole
    assert Path("output").is_symlink()
    Path("output/thesis.txt").write_text("mine")
    assert main([*MERGE, "--output", "output", "--overwrite"]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert content(Path("output")) == whole | {"thesis.txt": b"mine"}
    assert not [p for p in home.iterdir() if ".doratune-" in p.name]


def test_a_run_replaces_its_own_names_and_leaves_others(home, capsys):
    run = [*TRAIN, "--output", "new", "--targets", "[q_proj]", "--tensorboard", "false", "--rank", "2"]
    assert main(run) == 0
    Path("new/thesis.txt").write_text("mine")
    assert main([*run, "--rank", "3", "--overwrite"]) == 0
    assert Path("new/thesis.txt").read_text() == "mine"
    assert json.loads(Path("new/adapter/adapter_config.json").read_text())["r"] == 3
    written = [".doratune", "adapter", "checkpoint-1", "loss.png", "metrics.json", "recipe.yaml"]
    assert sorted(os.listdir("new")) == [*written, "thesis.txt"]
    Path("own/adapter").mkdir(parents=True)
    Path("own/adapter/thesis.txt").write_text("mine")
    capsys.readouterr()
    assert main([*TRAIN, "--output", "own", "--overwrite"]) == 2
    assert "own holds adapter, which no doratune command wrote there" in capsys.readouterr().err
    assert content(Path("own")) == {"adapter/thesis.txt": b"mine"}


def test_save_keeps_what_else_is_there(tmp_path):
    model = doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    folder = tmp_path / "adapter"
    doratune.save(model, folder)
    (folder / "README.md").write_text("mine")
    (folder / "notes").mkdir()
    (folder / "notes" / "a").write_text("mine")
    os.symlink("README.md", folder / "link")
    doratune.save(randomize(model), folder)
    assert (folder / "README.md").read_text() == (folder / "notes" / "a").read_text() == (folder / "link").read_text() == "mine"
    assert (folder / "link").is_symlink()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(doratune.load(tiny_llama(), folder)(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert os.listdir(tmp_path) == ["adapter"]


NO_FOLDER = ["/dev/null", "/dev/null/x", "data/items.json", "data/items.json/deep/x"]


@pytest.mark.parametrize("words", [MERGE, TRAIN, EVALUATE, ANALYZE, COMPARE, ["demo"]], ids=lambda words: words[0])
@pytest.mark.parametrize("output", NO_FOLDER)
def test_an_output_that_can_be_no_folder_is_one_line(words, output, home, capsys):
    overwrite = [] if words[0] in WITHOUT_OVERWRITE else ["--overwrite"]
    words = [*words, "--model", "base"] if words[0] == "demo" else words
    before = content(home)
    assert main([*words, "--output", output, *overwrite]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"doratune {words[0]}: ") and "\n" not in error
    assert content(home) == before


def test_a_page_over_a_device_is_one_line(home, capsys):
    assert main(["report", "run", "--analysis", "none", "--output", "/dev/null", "--overwrite"]) == 2
    assert "/dev/null is a device" in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()


def test_a_merged_model_that_disagrees_replaces_nothing(home, monkeypatch, capsys):
    """What is written is compared before it takes its place: here its weights are damaged on the way to the disk."""
    from doratune.checkpoint import merge

    assert main([*MERGE, "--output", "output"]) == 0
    whole = content(Path("output"))
    written = merge.write_tensors
    monkeypatch.setattr(merge, "write_tensors", lambda path, tensors: written(path, {k: 2 * t for k, t in tensors.items()}))
    assert main([*MERGE, "--output", "output", "--overwrite"]) == 1
    assert "differs from base + adapter; nothing was written to output" in capsys.readouterr().err
    assert content(Path("output")) == whole
