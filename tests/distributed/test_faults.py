"""What happens to runs of two processes: one is killed, all are, a signal, a gradient that is not finite, a disk that is full. The
last whole checkpoint is always there, and going on from it trains what a run trains that nobody stopped."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from launching import quiet, torchrun
from safetensors.torch import load_file

from doratune.training.checkpoints import last_checkpoint

STEPS = 24


@pytest.fixture(scope="module")
def words(tiny_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "data.json"
    items = [{"instruction": f"Is {i} even? {'really ' * (i % 5)}", "input": "", "output": str(i % 2 == 0)} for i in range(24)]
    data.write_text(json.dumps(items))
    settings = ["--rank", "2", "--lr", "5e-3", "--dtype", "float32", "--batch_size", "4", "--max_steps", str(STEPS)]
    settings += ["--log_steps", "1", "--targets", "all-linear", "--save_steps", "2", "--tensorboard", "false", "--dropout", "0"]
    return ["-m", "doratune", "train", "--model", str(tiny_folder), "--data", str(data), *settings]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = torchrun(*words, "--output", output)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def start(words, *launcher, processes=2, **more):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--standalone",
        *launcher,
        *map(str, words),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet(), **more)


def seen(path, process):
    """Wait for a path, as long as the process lives."""
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before"
        time.sleep(0.005)


def ranks(process):
    """The processes that train, by rank."""
    children = [child for child in psutil.Process(process.pid).children(recursive=True) if "doratune" in child.cmdline()]
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def same(run, expected):
    name = "adapter/adapter_model.safetensors"
    ours, theirs = load_file(run / name), load_file(expected / name)
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 2e-5
    assert json.loads((run / "metrics.json").read_text())["steps"] == STEPS


def resumed(words, run):
    done = torchrun(*words, "--output", run, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("when", "save_steps"), [("checkpoint-4", 2), ("recipe.yaml", 100)])
def test_one_that_is_killed_is_started_again_by_torchrun_and_goes_on(when, save_steps, victim, words, undisturbed, tmp_path):
    """From its last checkpoint, or from the beginning where it has none."""
    run = tmp_path / "run"
    process = start([*words, "--output", run, "--save_steps", str(save_steps)], "--max-restarts", "1")
    seen(run / when, process)
    ranks(process)[victim].kill()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    same(run, undisturbed)


def test_a_folder_of_another_run_is_not_taken_over_by_a_restart(words, undisturbed, tmp_path):
    """A run that is not this one's stays, in the first process and in each that is started again."""
    before = {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    done = subprocess.run(
        [sys.executable, *words, "--output", str(undisturbed), "--rank", "3"],
        capture_output=True,
        text=True,
        env=quiet(TORCHELASTIC_RESTART_COUNT="1"),
        timeout=600,
    )
    assert done.returncode == 2 and "exists and is not empty" in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before


@pytest.mark.parametrize("who", ["one", "all"])
def test_a_run_whose_processes_are_killed_is_resumed(who, words, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start([*words, "--output", run])
    seen(run / "checkpoint-4", process)
    victims = ranks(process)
    if who == "all":
        process.kill()
    for victim in victims[0 if who == "all" else 1 :]:
        victim.kill()
    process.communicate(timeout=600)
    assert process.returncode != 0 and last_checkpoint(run) is not None
    psutil.wait_procs(victims, timeout=600)
    resumed(words, run)
    same(run, undisturbed)


@pytest.mark.parametrize("by_length", ["true", "false"])
def test_a_later_epoch_is_resumed_in_its_own_order(by_length, words, tmp_path):
    """Six steps are an epoch: step 8 lies within the second, step 12 between two."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = [*words, "--group_by_length", by_length, "--keep_checkpoints", "12"]
    done = torchrun(*words, "--output", whole)
    assert done.returncode == 0, done.stderr[-3000:]
    for step in (8, 12):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        for path in run.glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        (run / "metrics.json").unlink()
        shutil.rmtree(run / "adapter")
        resumed(words, run)
        same(run, whole)


@pytest.mark.parametrize("whom", ["the launcher", "one process"])
def test_a_signal_stops_all_processes_after_the_same_step(whom, words, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start([*words, "--output", run])
    seen(run / "checkpoint-4", process)
    os.kill(process.pid if whom == "the launcher" else ranks(process)[1].pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode != 0 and "is complete: go on with --resume" in errors, errors[-3000:]
    assert last_checkpoint(run) is not None
    resumed(words, run)
    same(run, undisturbed)


SPOILED = """
import os, sys, torch
from transformers import LlamaForCausalLM
from doratune.cli.main import main

forward, calls = LlamaForCausalLM.forward, [0]

class Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * float(sys.argv[1])

def spoiling(self, *args, **kwargs):
    result = forward(self, *args, **kwargs)
    calls[0] += self.training
    if calls[0] == 4 and os.environ.get("RANK", "0") == sys.argv[2]:
        result.loss = Spoil.apply(result.loss)
    return result

spoiling.__wrapped__ = forward
LlamaForCausalLM.forward = spoiling
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("number", "rank", "processes"), [("nan", "1", 2), ("inf", "0", 2), ("nan", "0", 1)])
def test_a_gradient_that_is_not_finite_changes_nothing(number, rank, processes, words, undisturbed, tmp_path):
    script, run = tmp_path / "spoiled.py", tmp_path / "run"
    script.write_text(SPOILED)
    done = torchrun(script, number, rank, *words[2:], "--output", run, processes=processes)
    assert done.returncode != 0
    line = next(line for line in done.stderr.splitlines() if line.startswith("doratune train"))
    assert "is NaN or infinite at step 4" in line and "the step was not taken" in line
    assert last_checkpoint(run).name == "checkpoint-2" and not (run / "metrics.json").exists()
    resumed(words, run)
    same(run, undisturbed)


LAST = """
import atexit, os, pathlib, sys
from torch import distributed
from doratune.cli.main import main

def count():
    return sum("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm"))

left = pathlib.Path(sys.argv[1]) / os.environ["RANK"]
# the first registered is the last to run
atexit.register(lambda: left.write_text(f"{distributed.is_initialized()} {before} {count()}"))
status = main(sys.argv[2:])
before = count() > 0
sys.exit(status)
"""


@pytest.mark.parametrize(("fsdp", "left"), [("none", "False True 0"), ("shard", "False True")])
def test_the_group_is_taken_apart_before_the_interpreter_ends(fsdp, left, words, tmp_path):
    """A thread of gloo that outlives the interpreter kills a run that has done its work; PyTorch's caches keep those of shards."""
    script = tmp_path / "last.py"
    script.write_text(LAST)
    done = torchrun(script, tmp_path, *words[2:], "--output", tmp_path / "run", "--max_steps", "2", "--fsdp", fsdp)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / rank).read_text().startswith(left) for rank in "01")


def test_a_full_disk_leaves_the_checkpoint_before(words, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start([*words, "--output", run])
    seen(run / "checkpoint-4", process)
    for victim in ranks(process):
        resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    _, errors = process.communicate(timeout=600)
    assert process.returncode != 0 and "Traceback" not in errors.split("torch/distributed")[0], errors[-3000:]
    assert last_checkpoint(run) is not None
    resumed(words, run)
    same(run, undisturbed)
