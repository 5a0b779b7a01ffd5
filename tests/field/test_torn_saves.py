"""Killed while it writes: a folder is one generation, the old one or the new one, nothing is lost and nothing is left over.

The long runs: DORATUNE_KILLS=1000 for the save loop, DORATUNE_COMMAND_KILLS=100 for each of train, merge and compare.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import killing
import killing_several
import pytest
import torch
import yaml
from conftest import randomize, tiny_llama

import doratune
from doratune.checkpoint.adapter import read_folder
from doratune.cli.main import main
from doratune.support import folders
from doratune.training.train import last_checkpoint

KILLS, COMMAND_KILLS = (int(os.environ.get(name, "0")) for name in ("DORATUNE_KILLS", "DORATUNE_COMMAND_KILLS"))


def figures_of(mode, count, place):
    script = [killing_several.__file__] if mode == "several" else [killing.__file__, mode]
    words = [sys.executable, *script, str(count), str(place)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=7200)
    assert run.returncode == 0, run.stderr[-4000:]
    figures = json.loads(run.stdout.strip().splitlines()[-1])
    print(figures)
    return figures


def test_saves_of_several_processes_that_are_killed(tmp_path):
    figures = figures_of("several", COMMAND_KILLS or 4, tmp_path / "k")
    assert [figures[key] for key in ("torn", "none", "leftovers")] == [0, 0, 0]
    assert figures["kills"] and figures["resumed"] and figures["difference"] < 2e-5


@pytest.mark.parametrize("mode", ["swap", "renames", "files"])
def test_a_save_that_is_killed(mode, tmp_path):
    figures = figures_of(mode, KILLS or 25, tmp_path / "k")
    assert figures["kills"] == (KILLS or 25)
    assert [figures[key] for key in ("torn", "mixed", "lost", "leftovers")] == [0, 0, 0, 0]
    assert mode == "files" or figures["refused"] == 0


@pytest.mark.parametrize("mode", ["train", "merge", "compare"])
def test_a_command_that_is_killed_and_given_again(mode, tmp_path):
    short = {"train": 4, "merge": 3, "compare": 0}[mode]
    if not (COMMAND_KILLS or short):
        pytest.skip("a grid takes half a minute a kill: set DORATUNE_COMMAND_KILLS")
    figures = figures_of(mode, COMMAND_KILLS or short, tmp_path / "k")
    assert {key: n for key, n in figures.items() if n and key in ("torn", "mixed", "lost", "leftovers", "different")} == {}


def two(tmp_path):
    """Two adapter folders of one model with the same settings and other numbers."""
    for seed, name in enumerate(("a", "b")):
        model = doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj"]))
        doratune.save(randomize(model, seed), tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def test_files_of_two_saves_are_refused(tmp_path):
    a, b = two(tmp_path)
    shutil.copy(b / "adapter_model.safetensors", a)
    with pytest.raises(doratune.UserError, match=r"adapter_model.safetensors and doratune.json are of two different saves"):
        doratune.load(tiny_llama(), a)


def test_files_of_two_saves_with_relative_magnitudes_are_refused(tmp_path):
    for seed, name in enumerate(("a", "b")):
        config = doratune.AdapterConfig(rank=2, targets=["q_proj"], magnitude_form="relative")
        doratune.save(randomize(doratune.attach(tiny_llama(seed), config), seed), tmp_path / name)
    starts = next(p.name for p in (tmp_path / "a").iterdir() if "start" in p.name)
    shutil.copy(tmp_path / "b" / starts, tmp_path / "a")
    with pytest.raises(doratune.UserError, match=f"{starts} and doratune.json are of two different saves"):
        doratune.load(tiny_llama(), tmp_path / "a")


def test_without_a_fingerprint_a_folder_loads(tmp_path):
    """doratune.json deleted (PEFT's layout), of an older version, or tensors that PEFT wrote over ours."""
    from safetensors.torch import load_file, save_file

    a, b = two(tmp_path)
    (a / "doratune.json").unlink()
    doratune.load(tiny_llama(), a)
    own = json.loads((b / "doratune.json").read_text())
    (b / "doratune.json").write_text(json.dumps({k: v for k, v in own.items() if k != "fingerprint"}))
    doratune.load(tiny_llama(), b)
    (b / "doratune.json").write_text(json.dumps(own))
    save_file(load_file(a / "adapter_model.safetensors"), b / "adapter_model.safetensors", metadata={"format": "pt"})
    doratune.load(tiny_llama(), b)


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    model = randomize(doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj"])))
    names = "abcdefgh"  # the order of two metadata is a coin's
    for name in names:
        doratune.save(model, tmp_path / name)
    for p in (tmp_path / "a").iterdir():
        assert len({(tmp_path / name / p.name).read_bytes() for name in names}) == 1


def test_a_folder_that_was_set_aside_comes_back(tmp_path):
    """Killed between the two renames of a file system that has no exchange: the next read finds the old generation."""
    a, _ = two(tmp_path)
    whole = read_folder(a)[2]
    os.rename(a, folders._aside(a))
    assert all(torch.equal(t, whole[key]) for key, t in read_folder(a)[2].items())
    assert a.is_dir()


@pytest.fixture(scope="module")
def words(tiny_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "data.json"
    data.write_text(json.dumps([{"instruction": f"Is {i} even?", "input": "", "output": str(i % 2 == 0)} for i in range(16)]))
    settings = ["--rank", "2", "--lr", "5e-3", "--dtype", "float32", "--batch_size", "4", "--max_steps", "4", "--log_steps", "1"]
    settings += ["--targets", "[q_proj]", "--save_steps", "2", "--tensorboard", "false", "--keep_checkpoints", "2"]
    return ["train", "--model", str(tiny_folder), "--data", str(data), *settings]


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main([*words, "--output", str(run)]) == 0
    return run


TORN = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"]


@pytest.mark.parametrize("name", TORN)
@pytest.mark.parametrize("how", ["truncated", "empty", "zeros"])
def test_a_damaged_checkpoint_is_passed_over(how, name, words, trained, tmp_path, capsys):
    """To the one before; without one, one line. The result is that of the run that nobody stopped."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "metrics.json").unlink()
    path = run / "checkpoint-4" / name
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "zeros": bytes(len(whole))}[how])
    assert last_checkpoint(run).name == "checkpoint-2"
    if name == "optimizer.pt":  # all of the way; the other files take the same one
        assert main([*words, "--output", str(run), "--resume"]) == 0
        assert "checkpoint-4 is passed over: optimizer.pt is" in capsys.readouterr().out
        assert killing.same(run / "adapter", trained / "adapter") and killing.trained(run) == killing.trained(trained)
    shutil.rmtree(run / "checkpoint-2")
    path.write_bytes(b"")
    capsys.readouterr()
    assert main([*words, "--output", str(run), "--resume"]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_a_missing_optimizer_is_damage_until_the_last_step(words, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "checkpoint-4" / "optimizer.pt").unlink()  # what compare forgets of a finished cell
    assert last_checkpoint(run).name == "checkpoint-4"
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    shutil.rmtree(run / "checkpoint-4")
    assert last_checkpoint(run) is None


def test_a_run_that_is_begun_over_another_keeps_it_until_the_end(words, trained, tmp_path, capsys):
    """Stopped by a signal, by an error, begun again, finished: never the recipe of one with the adapter of another."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    over = [*words, "--output", str(run), "--rank", "3", "--overwrite"]
    assert main([*over, "--lr", "1e18", "--max_grad_norm", "0", "--max_steps", "40", "--save_steps", "100"]) == 2
    assert yaml.safe_load((run / "recipe.yaml").read_text())["rank"] == 3
    assert not (run / "adapter").exists() and not (run / "metrics.json").exists()
    assert killing.same(run / ".replaced" / "adapter", trained / "adapter")
    assert main([*words, "--output", str(run), "--resume"]) == 2
    assert "the run before it is in" in capsys.readouterr().err
    assert main([*over, "--targets", "[nowhere]"]) == 2  # found before anything is moved
    assert killing.same(run / ".replaced" / "adapter", trained / "adapter")
    assert main(over) == 0
    assert read_folder(run / "adapter")[0].rank == 3
    assert killing.leftovers(run) == []


def test_a_run_that_was_half_set_aside_is_resumed(words, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / ".replaced").mkdir()
    for name in ("metrics.json", "adapter"):  # killed here: the recipe goes last
        os.rename(run / name, run / ".replaced" / name)
    assert main([*words, "--output", str(run), "--resume"]) == 0
    assert killing.same(run / "adapter", trained / "adapter")
    assert killing.leftovers(run) == []


def test_what_a_live_process_is_writing_stays(tmp_path):
    """The net for leftovers takes those of the dead only."""
    code = (
        "import sys, pathlib\nfrom doratune.support.folders import generation\n"
        "with generation(pathlib.Path(sys.argv[1]), lambda name: False) as stage:\n"
        "    (stage / 'x').write_text('x'); print(stage, flush=True); sys.stdin.read()\n"
    )
    folder = tmp_path / "adapter"
    live = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    dead = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stages = [Path(process.stdout.readline().strip()) for process in (live, dead)]
    dead.kill()
    dead.communicate()
    model = doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    doratune.save(model, folder)
    assert [stage.exists() for stage in stages] == [True, False]
    live.communicate(timeout=600)
    assert os.listdir(folder) == ["x"] or sorted(os.listdir(folder))[0] == "adapter_config.json"
    assert os.listdir(tmp_path) == ["adapter"]
