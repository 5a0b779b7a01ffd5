"""A full disk, a limit on file sizes, a folder without permission: one line, exit status 2, and what was there is as it was."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_llama

import doratune
from doratune.cli.main import main
from doratune.support.files import write_json, write_tensors


@pytest.fixture(scope="module")
def home(tiny_folder, tmp_path_factory):
    """An adapter of a tiny model, and items to train and to score on."""
    home = tmp_path_factory.mktemp("home")
    model = tiny_llama()
    model.config._name_or_path = str(tiny_folder)
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    doratune.save(randomize(model), home / "adapter")
    items = [{"instruction": f"Is {i} even? {'long ' * 300}", "input": "", "output": "true", "answer": "true"} for i in range(8)]
    (home / "items.json").write_text(json.dumps(items))
    return home


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this process may not mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def words_of(command, home, tiny_folder):
    model, items = str(tiny_folder), str(home / "items.json")
    return {
        "merge": ["merge", "--adapter", str(home / "adapter")],
        "train": [
            "train",
            "--model",
            model,
            "--data",
            items,
            "--max_steps",
            "1",
            "--targets",
            "[q_proj]",
            "--also_train",
            "[lm_head]",
        ],
        "full": ["train", "--model", model, "--data", items, "--max_steps", "1", "--method", "full", "--max_length", "64"],
        "evaluate": ["evaluate", "--adapter", str(home / "adapter"), "--task", items, "--protocol", "likelihood"],
        "analyze": ["analyze", str(home / "adapter"), "--model", model],
    }[command]


@pytest.mark.parametrize("command", ["merge", "train", "full", "evaluate", "analyze"])
def test_a_full_disk_is_one_line(command, home, tiny_folder, small_disk, capsys):
    block = small_disk / "block"
    block.write_bytes(b"x" * (16 if command != "evaluate" else 44) * 1024)
    words = [*words_of(command, home, tiny_folder), "--output", str(small_disk / "out")]
    assert main(words) == 2
    errors = capsys.readouterr().err
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"doratune {words[0]}: ") and "free some space" in last, errors
    assert "Traceback" not in errors
    assert not [p for p in small_disk.rglob("*") if ".doratune-" in p.name]
    if words[0] == "train":  # its recipe is there, and nothing that looks finished
        assert not (small_disk / "out" / "metrics.json").exists() and not list(small_disk.glob("out/checkpoint-*"))
    else:
        assert os.listdir(small_disk) == ["block"]


def test_a_save_into_a_full_disk_leaves_the_adapter(small_disk):
    model = doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    doratune.save(model, small_disk / "adapter")
    before = {p.name: p.read_bytes() for p in (small_disk / "adapter").iterdir()}
    large = doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=16, targets="all-linear", also_train=["lm_head"]))
    with pytest.raises(doratune.UserError, match=r"adapter.* cannot be written .No space left on device; free some space"):
        doratune.save(large, small_disk / "adapter")
    assert {p.name: p.read_bytes() for p in (small_disk / "adapter").iterdir()} == before
    assert os.listdir(small_disk) == ["adapter"]


@pytest.mark.parametrize("command", ["merge", "evaluate"])
def test_a_limit_on_file_sizes_is_one_line(command, home, tiny_folder, tmp_path):
    """The same through EFBIG, in a process of its own, which any user can have."""
    words = [*words_of(command, home, tiny_folder), "--output", str(tmp_path / "out")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    run = subprocess.run([sys.executable, "-m", "doratune.cli", *words], capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 2, run.stderr[-2000:]
    assert "File too large; raise the limit on file sizes" in run.stderr.strip().splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_standard_output_on_a_full_disk_is_one_line(home):
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "doratune.cli", "inspect", "--adapter", str(home / "adapter")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("doratune inspect: No space left on device")


def test_single_files_are_as_they_were(small_disk):
    path = small_disk / "facts.json"
    write_json(path, {"a": 1})
    with pytest.raises(doratune.UserError, match=r"facts.json cannot be written .No space left"):
        write_json(path, {"a": "x" * 100_000})
    with pytest.raises(doratune.UserError, match=r"facts.json cannot be written .No space left"):
        write_tensors(path, {"a": torch.zeros(50_000)})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(small_disk) == ["facts.json"]


@pytest.fixture
def read_only(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return small_disk


@pytest.mark.parametrize("command", ["merge", "train", "evaluate", "analyze"])
def test_a_folder_that_takes_nothing_is_found_before_anything_is_loaded(command, home, tiny_folder, read_only, capsys):
    words = [*words_of(command, home, tiny_folder), "--output", str(read_only / "deep" / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert "no permission to write into" in error and "\n" not in error
    with pytest.raises(doratune.UserError, match="cannot be written"):
        doratune.save(
            doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj"])), Path(read_only) / "adapter"
        )
