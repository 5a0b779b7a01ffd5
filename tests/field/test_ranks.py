"""Several processes of one launch train together and leave one folder, or are refused."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from doratune.cli.main import main
from doratune.training.train import last_checkpoint


def quiet(**more):
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


@pytest.fixture(scope="module")
def words(tiny_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "data.json"
    items = [{"instruction": f"Is {i} even? {'really ' * (i % 5)}", "input": "", "output": str(i % 2 == 0)} for i in range(24)]
    data.write_text(json.dumps(items))
    settings = ["--rank", "2", "--lr", "5e-3", "--dtype", "float32", "--batch_size", "2", "--max_steps", "4", "--log_steps", "1"]
    settings += ["--targets", "[q_proj, v_proj]", "--save_steps", "2", "--tensorboard", "false", "--eval_size", "4"]
    return ["train", "--model", str(tiny_folder), "--data", str(data), *settings]


def torchrun(words):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "doratune.cli"]
    return subprocess.run([*launch, *words], capture_output=True, text=True, timeout=600, env=quiet())


def test_two_ranks_train_into_one_folder(words, tmp_path):
    """Into a new folder, and over an old one; one of them speaks, and the run that was there before is gone at the end."""
    output = tmp_path / "run"
    first = torchrun([*words, "--output", str(output), "--json"])
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stdout.count("layers adapted") == first.stdout.count("max_steps: 4") == 1
    metrics = json.loads(first.stdout.strip().splitlines()[-1])
    assert metrics["steps"] == 4
    checkpoint = last_checkpoint(output)
    assert checkpoint.name == "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= {p.name for p in checkpoint.iterdir()}
    saved, result = (load_file(p / "adapter_model.safetensors") for p in (checkpoint, output / "adapter"))
    assert all(saved[k].equal(result[k]) for k in result)

    again = torchrun([*words, "--output", str(output), "--rank", "3", "--overwrite"])
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["r"] == 3
    assert not [p for p in output.iterdir() if p.name == ".replaced" or ".doratune-" in p.name]

    refused = torchrun([*words, "--output", str(output)])
    assert refused.returncode != 0
    assert refused.stderr.count("exists and is not empty") == 1
    assert "UserError" not in refused.stderr  # the traceback there is torchrun's own


@pytest.mark.parametrize("command", ["merge", "evaluate", "analyze", "compare", "report", "demo", "bench"])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_commands_of_one_process_say_so(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(name, "2")
    assert main([command, "--output", str(tmp_path / "out")]) == 2
    assert f"doratune {command} runs in one process, but {name} is 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main([command, "--help"])


def test_ranks_that_are_not_connected_are_refused(words, tmp_path, monkeypatch, capsys):
    """The environment says two, and accelerate connects none, as it does where its engine is configured otherwise."""
    from accelerate.state import DistributedType, PartialState

    monkeypatch.setattr(PartialState, "_prepare_backend", lambda *a, **k: (None, DistributedType.NO))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    PartialState._reset_state()
    try:
        assert main([*words, "--output", str(tmp_path / "run")]) == 2
    finally:
        PartialState._reset_state()
    assert "WORLD_SIZE is 2, but 1 of these processes is connected" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
