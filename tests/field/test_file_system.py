"""What the file system refuses, for every command that reads or writes: one line with the place, exit status 2, no traceback, and
nothing left behind. Files that may not be read; a file, a read-only or a full disk where the output belongs."""

import codecs
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import uvicorn  # noqa: F401 (another user may not be able to read what it imports)
from conftest import randomize, tiny_llama

import doratune
from doratune.cli.main import main

NOBODY = 65534
SUPERUSER = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(scope="module")
def desk(tiny_folder):
    """A model, an adapter, a run, data, prompts, a task, where another user can see them."""
    desk = Path(tempfile.mkdtemp(prefix="doratune-files-"))
    desk.chmod(0o755)
    shutil.copytree(tiny_folder, desk / "model")
    shutil.copytree(tiny_folder, desk / "tuned")
    model = tiny_llama()
    model.config._name_or_path = str(desk / "model")
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    doratune.save(randomize(model), desk / "adapter")
    items = [{"instruction": f"Is {i} even?", "input": "", "output": "true", "answer": "true"} for i in range(8)]
    (desk / "items.json").write_text(json.dumps(items))
    (desk / "prompts.txt").write_text("one\ntwo\n")
    (desk / "recipe.yaml").write_text(f"model: {desk / 'model'}\ndata: {desk / 'items.json'}\nrank: 2\nmax_steps: 1\n")
    (desk / "grid.yaml").write_text(f"recipe: {desk / 'recipe.yaml'}\nmethods: [lora, dora]\nseeds: [0]\n")
    assert main(["train", str(desk / "recipe.yaml"), "--output", str(desk / "run"), "--batch_size", "4"]) == 0
    for path in desk.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield desk
    shutil.rmtree(desk)


def words(name: str, desk: Path) -> list[str]:
    model, adapter, items = str(desk / "model"), str(desk / "adapter"), str(desk / "items.json")
    return {
        "train": ["train", str(desk / "recipe.yaml")],
        "data": ["data", items, "--model", model],
        "init": ["init", items, "--model", model, "--device", "cpu", "--memory", "2"],
        "runs": ["runs", str(desk / "run")],
        "evaluate": ["evaluate", "--adapter", adapter, "--task", items, "--protocol", "likelihood"],
        "merge": ["merge", "--adapter", adapter],
        "convert": ["convert", "--adapter", adapter, "--to", "mlx", "--model", model],
        "gguf": ["export", "--to", "gguf", "--adapter", adapter],
        "lora": ["export", "--to", "lora", "--rank", "2", "--adapter", adapter],
        "lora-scale": ["export", "--to", "lora-scale", "--adapter", adapter],
        "extract": ["extract", "--model", model, "--tuned", str(desk / "tuned"), "--rank", "2"],
        "generate": ["generate", "--adapter", adapter, "--prompts", str(desk / "prompts.txt"), "--max_new_tokens", "2"],
        "analyze": ["analyze", adapter, "--model", model, "--modules", "q_proj"],
        "report": ["report", str(desk / "run"), "--analysis", "none"],
        "inspect": ["inspect", "--adapter", adapter],
        "plan": ["plan", str(desk / "recipe.yaml"), "--memory", "2", "--largest", "none"],
        "compare": ["compare", str(desk / "grid.yaml"), "--dry_run", "true"],
        "push": ["push", "--folder", adapter, "--to", "me/mine", "--dry_run", "true"],
        "chat": ["chat", "--adapter", adapter],
        "serve": ["serve", "--adapter", adapter, "--port", "0"],
    }[name]


READ = {
    "train": ["recipe.yaml", "items.json", "model/config.json", "model/model.safetensors", "model/tokenizer.json", "model"],
    "data": ["items.json", "model/tokenizer.json", "model/config.json"],
    "init": ["items.json", "model/config.json", "model/tokenizer.json"],
    "runs": ["run"],
    "evaluate": ["items.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model/model.safetensors"],
    "merge": [
        "adapter/adapter_model.safetensors",
        "adapter/doratune.json",
        "adapter",
        "model/model.safetensors",
        "model/config.json",
    ],
    "convert": ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model/config.json"],
    "gguf": ["adapter/adapter_config.json", "model/model.safetensors", "model/tokenizer.json"],
    "lora": ["adapter/adapter_model.safetensors", "model/model.safetensors"],
    "lora-scale": ["adapter/adapter_model.safetensors", "model/model.safetensors"],
    "extract": ["tuned/model.safetensors", "tuned/config.json", "model/model.safetensors"],
    "generate": ["prompts.txt", "adapter/adapter_config.json", "model/tokenizer.json"],
    "analyze": ["adapter/adapter_model.safetensors", "model/model.safetensors", "adapter"],
    "report": ["run"],
    "inspect": ["adapter/adapter_config.json", "model/model.safetensors"],
    "plan": ["recipe.yaml", "model/config.json"],
    "compare": ["grid.yaml", "recipe.yaml"],
    "push": ["adapter/adapter_config.json", "adapter"],
    "chat": ["adapter/adapter_model.safetensors", "model/tokenizer.json"],
    "serve": ["adapter/adapter_config.json", "model/config.json"],
}

WRITERS = [
    "train",
    "evaluate",
    "merge",
    "convert",
    "gguf",
    "lora",
    "lora-scale",
    "extract",
    "generate",
    "analyze",
    "report",
    "data",
]
WRITERS += ["init"]
FILES = {"generate": "out.jsonl", "report": "out.html", "data": "out.jsonl", "init": "out.yaml"}


def output(name: str, place: Path) -> list[str]:
    return ["--fix" if name == "data" else "--output", str(place / FILES.get(name, "out"))]


@contextlib.contextmanager
def unreadable(path: Path):
    """A file or folder that nobody but the superuser may open, and this process as somebody else."""
    mode = path.stat().st_mode & 0o7777
    path.chmod(0)
    try:
        with somebody_else():
            yield
    finally:
        path.chmod(mode)


@contextlib.contextmanager
def somebody_else():
    if not SUPERUSER:
        yield
        return
    codecs.lookup("idna")  # which sockets load when they first ask for a host, where that user may not be able to read it
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def refused(arguments: list[str], capsys) -> str:
    """The last line of what a command says that ends with status 2."""
    status = main(arguments)
    errors = capsys.readouterr().err
    assert status == 2, errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith(f"doratune {arguments[0]}: ") and "Traceback" not in errors, errors
    return line


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in READ.items() for file in files])
def test_what_may_not_be_read(name, file, desk, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = Path(tempfile.mkdtemp(prefix="doratune-out-"))
    place.chmod(0o777)
    arguments = words(name, desk) + (output(name, place) if name in WRITERS else [])
    try:
        with unreadable(desk / file):
            line = refused(arguments, capsys)
        assert "ermission" in line or "cannot be read" in line or "may not" in line, line
        assert Path(file).parts[0] in line, line
        assert list(place.iterdir()) == [] or name == "train"
    finally:
        shutil.rmtree(place)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("file", ["recipe.yaml", "metrics.json"])
def test_a_report_says_what_it_could_not_read(file, desk, capsys):
    """The rest of a run is shown."""
    place = Path(tempfile.mkdtemp(prefix="doratune-out-"))
    place.chmod(0o777)
    with unreadable(desk / "run" / file):
        assert main([*words("report", desk), "--output", str(place / "out.html")]) == 0
    assert ", 0 warnings" not in capsys.readouterr().out and file in (place / "out.html").read_text()
    shutil.rmtree(place)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_where_a_folder_belongs(name, desk, tmp_path, capsys):
    (tmp_path / "in_the_way").write_text("mine")
    line = refused(words(name, desk) + output(name, tmp_path / "in_the_way"), capsys)
    assert "in_the_way" in line
    assert [p.name for p in tmp_path.iterdir()] == ["in_the_way"] and (tmp_path / "in_the_way").read_text() == "mine"


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_where_a_file_belongs_or_the_other_way_round(name, desk, tmp_path, capsys):
    target = tmp_path / FILES.get(name, "out")
    if name in FILES:
        target.mkdir()
    else:
        target.write_text("mine")
    line = refused([*words(name, desk), *output(name, tmp_path)], capsys)
    assert target.name in line and [p.name for p in tmp_path.iterdir()] == [target.name]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_may_not_be_written(name, desk, capsys):
    place = Path(tempfile.mkdtemp(prefix="doratune-closed-"))
    place.chmod(0o555)
    try:
        with somebody_else():
            line = refused(words(name, desk) + output(name, place), capsys)
        assert "ermission" in line and place.name in line
        assert list(place.iterdir()) == []
    finally:
        shutil.rmtree(place)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this process may not mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up(name, desk, small_disk, capsys):
    (small_disk / "block").write_bytes(b"x" * 8 * 1024)
    line = refused(words(name, desk) + output(name, small_disk), capsys)
    assert "No space left on device; free some space" in line
    assert not [path for path in small_disk.rglob("*") if ".doratune-" in path.name]
