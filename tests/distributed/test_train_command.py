"""`doratune train` in two processes, however it is started, trains what one process trains, and goes on at another number."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import tiny_llama
from launching import quiet, torchrun
from safetensors.torch import load_file

from doratune.cli.main import main


@pytest.fixture(scope="module")
def words(tiny_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "data.json"
    items = [{"instruction": f"Is {i} even? {'really ' * (i % 5)}", "input": "", "output": str(i % 2 == 0)} for i in range(24)]
    data.write_text(json.dumps(items))
    settings = ["--rank", "2", "--lr", "5e-3", "--dtype", "float32", "--batch_size", "4", "--max_steps", "4", "--log_steps", "1"]
    settings += ["--targets", "all-linear", "--save_steps", "2", "--tensorboard", "false", "--eval_size", "4"]
    settings += ["--keep_checkpoints", "2", "--dropout", "0"]
    return ["train", "--model", str(tiny_folder), "--data", str(data), *settings]


@pytest.fixture(scope="module")
def single(words, tmp_path_factory):
    output = tmp_path_factory.mktemp("single") / "run"
    assert main([*words, "--output", str(output)]) == 0
    return output


def of(run):
    """(losses, evaluation loss, tensors) of a run."""
    metrics = json.loads((run / "metrics.json").read_text())
    losses = [row["loss"] for row in metrics["log"] if "loss" in row]
    return losses, metrics["eval_loss"], load_file(run / "adapter" / "adapter_model.safetensors")


def same(run, expected, steps=4):
    (losses, evaluation, tensors), (base_losses, base_evaluation, base_tensors) = of(run), of(expected)
    assert len(losses) == steps and losses == pytest.approx(base_losses[-steps:], abs=1e-5)
    assert evaluation == pytest.approx(base_evaluation, abs=1e-5)
    assert tensors.keys() == base_tensors.keys()
    for name in tensors:
        assert (tensors[name] - base_tensors[name]).abs().max() < 2e-5, name


@pytest.fixture(scope="module")
def launched_by_torchrun(words, tmp_path_factory):
    output = tmp_path_factory.mktemp("ddp") / "run"
    return torchrun("-m", "doratune", *words, "--output", output, "--json"), output


@pytest.fixture(scope="module")
def launched_by_accelerate(words, tmp_path_factory):
    """With an FSDP2 configuration, which accelerate takes for DDP on CPUs."""
    output = tmp_path_factory.mktemp("fsdp") / "run"
    fsdp = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True}
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "fsdp_config": fsdp, "mixed_precision": "no"}
    settings |= {"num_processes": 2, "num_machines": 1, "machine_rank": 0, "use_cpu": True, "main_process_port": free_port()}
    config = output.parent / "accelerate.json"
    config.write_text(json.dumps(settings))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = [*launch, "-m", "doratune", *words, "--output", str(output), "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=quiet()), output


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_started_by_torchrun(launched_by_torchrun, single):
    done, output = launched_by_torchrun
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes, DDP: each takes 2 of the 4 examples") == done.stdout.count("layers adapted") == 1
    assert json.loads(done.stdout.strip().splitlines()[-1])["steps"] == 4
    same(output, single)


def test_accelerate_launch_with_fsdp2_really_shards(launched_by_accelerate, single):
    done, output = launched_by_accelerate
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes, FSDP2") == 1
    same(output, single)
    written = sorted(path.name for path in (output / "checkpoint-2").iterdir())
    assert "optimizer.pt" in written and not [name for name in written if "fsdp" in name or name.startswith("model")]


def interrupted(run, folder):
    """A copy of a run as it was after its second step."""
    copy = folder / "run"
    shutil.copytree(run, copy)
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(copy / name)
    (copy / "metrics.json").unlink()
    return copy


def test_one_process_goes_on_where_two_sharded_ones_were(words, launched_by_accelerate, single, tmp_path):
    run = interrupted(launched_by_accelerate[1], tmp_path)
    assert main([*words, "--output", str(run), "--resume"]) == 0
    same(run, single)


def test_two_processes_go_on_where_one_was(words, single, tmp_path):
    """Started by --processes; sharded, although the run before was not."""
    run = interrupted(single, tmp_path)
    command = [sys.executable, "-m", "doratune", *words, "--output", str(run), "--resume", "--processes", "2", "--fsdp", "offload"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=quiet())
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes, FSDP2") == 1
    same(run, single)


def test_merges_are_the_same(launched_by_torchrun, launched_by_accelerate, single, tiny_folder, tmp_path):
    """From the adapter of each run, and from a checkpoint as it lies."""
    merged = {}
    runs = {"single": single, "ddp": launched_by_torchrun[1], "fsdp": launched_by_accelerate[1]}
    for name, run in runs.items():
        for adapter in ("adapter", "checkpoint-4"):
            output = tmp_path / f"{name} {adapter}"
            assert main(["merge", "--model", str(tiny_folder), "--adapter", str(run / adapter), "--output", str(output)]) == 0
            merged[output.name] = load_file(output / "model.safetensors")
    plain = tiny_llama().state_dict()
    for name, tensors in merged.items():
        assert all((t - merged["single adapter"][key]).abs().max() < 2e-5 for key, t in tensors.items()), name
        assert any((t - plain[key]).abs().max() > 1e-3 for key, t in tensors.items())


REFUSED = {
    "a batch that cannot be shared": (["--batch_size", "5"], "2", "batch_size is 5, which 2 processes cannot share equally"),
    "FSDP alone": (["--fsdp", "shard"], None, "fsdp is 'shard', but there is one process"),
    "FSDP of another method": (["--fsdp", "shard", "--method", "full"], None, "fsdp is 'shard', which is for adapters"),
    "FSDP and tasks": (["--fsdp", "shard", "--tasks", "[boolq]"], None, "tasks are scored in one process"),
    "no process": (["--processes", "0"], None, "processes is 0"),
    "no such engine": (["--fsdp", "zero"], None, "fsdp is 'zero'; expected one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, words, tmp_path, monkeypatch, capsys):
    more, size, message = REFUSED[name]
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setattr("doratune.training.train.connect", lambda *_: None)
    assert main([*words, "--output", str(tmp_path / "run"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_process_that_reaches_nobody_says_so(words, tmp_path):
    alone = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "doratune", *words, "--output", str(tmp_path / "run"), "--timeout", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=quiet(**alone))
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("doratune train")]
    assert len(said) == 1
    assert f"process 1 did not reach the others at 127.0.0.1:{alone['MASTER_PORT']} within 2 s" in said[0]
    assert not os.path.exists(tmp_path / "run")
