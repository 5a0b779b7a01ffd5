"""`pip install doratune` from a built wheel: what is in it, and its commands in fresh environments, with all extras and none."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import wheels

ROOT = wheels.ROOT
PLAIN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
PLAIN |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
EXTRAS = importlib.metadata.metadata("doratune").get_all("Provides-Extra")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools")
    return wheels.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def everything(wheel, tmp_path_factory):
    return wheels.environment(tmp_path_factory.mktemp("everything") / "venv", wheel, wheels.all_packages())


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory):
    """torch, safetensors, regex and what they need."""
    home = tmp_path_factory.mktemp("core")
    packages = wheels.chosen_packages(home / "packages", ["torch", "safetensors", "regex", "numpy"])
    return wheels.environment(home / "venv", wheel, packages)


def run(python, folder, *words, program="doratune", status=0):
    command = [python.parent / "doratune", *words] if program == "doratune" else [python, "-c", program, *words]
    result = subprocess.run(command, cwd=folder, env=PLAIN, capture_output=True, text=True, timeout=300)
    assert result.returncode == status, result.stdout[-1000:] + result.stderr[-3000:]
    return result


def test_the_wheel_holds_every_file_of_the_package_and_the_recipes(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    wanted = {str(p.relative_to(source)) for p in (source / "doratune").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    wanted |= {f"doratune/recipes/{p.name}" for p in (ROOT / "recipes").glob("*.yaml")}
    assert held == {name.replace(os.sep, "/") for name in wanted}


def test_its_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "Requires-Python: >=3.10" in metadata and "License-Expression: Apache-2.0" in metadata
    assert "doratune = doratune.cli.main:entry" in archive.read(f"{info}/entry_points.txt").decode()
    assert not re.search(r"^Requires-Dist: (?!torch|safetensors|regex)[^;]*$", metadata, re.M)


def test_it_runs_from_the_wheel_and_says_on_what(everything, tmp_path):
    said = run(everything, tmp_path, "--version").stdout
    assert re.fullmatch(r"doratune \S+ \(Python \S+, torch \S+, transformers \S+\)\n", said)
    where = run(everything, tmp_path, program="import doratune; print(doratune.__file__)").stdout
    assert str(everything.parents[1]) in where
    assert "nothing has to be mended" in run(everything, tmp_path, "doctor").stdout
    assert "--rank RANK" in run(everything, tmp_path, "train", "--help").stdout


def test_a_recipe_of_the_wheel_trains(everything, tmp_path, tiny_folder):
    """From an empty folder, where no recipes/ lies."""
    items = [{"instruction": f"Is {i} even?", "input": "", "output": "the correct answer is true"} for i in range(8)]
    (tmp_path / "my.json").write_text(json.dumps(items))
    words = ["--model", str(tiny_folder), "--data", "my.json", "--output", "run", "--max_steps", "1", "--batch_size", "4"]
    run(everything, tmp_path, "train", "recipes/demo.yaml", *words, "--eval_size", "0", "--tasks", "[]")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    error = run(everything, tmp_path, "train", "recipes/demmo.yaml", status=2).stderr
    assert "no such recipe" in error and "did you mean 'recipes/demo.yaml'" in error


def test_without_any_extra(core, tmp_path):
    said = run(core, tmp_path, "--version").stdout
    assert "torch" in said and "transformers" not in said
    assert "[train]" in run(core, tmp_path, "doctor").stdout
    for command in ("train", "merge", "serve"):
        line = run(core, tmp_path, command, "--help", status=2).stderr
        assert re.fullmatch(rf"doratune {command}: needs \w+; pip install 'doratune\[train\]'\n", line)
    program = (
        "import sys, torch, doratune\n"
        "build = lambda: torch.nn.Sequential(torch.nn.Linear(5, 6))\n"
        "model = build(); doratune.attach(model, doratune.AdapterConfig(rank=2, targets=['0']))\n"
        "doratune.save(model, 'adapter'); base = build(); base.load_state_dict(doratune.merged_state_dict(model))\n"
        "doratune.load(base, 'adapter'); doratune.merge(base); print(type(base[0]).__name__, 'transformers' in sys.modules)\n"
    )
    assert run(core, tmp_path, program=program).stdout == "Linear False\n"


def test_every_extra_alone_fits_what_is_pinned(wheel):
    """Against the packages that are installed here; with DORATUNE_INSTALL=1 against the package index, as if nothing were."""
    words = ["install", "--dry-run", "-q", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    words += ["--ignore-installed"] if os.environ.get("DORATUNE_INSTALL") else ["--no-index"]

    def resolve(extra: str) -> str:
        """What pip says where an extra cannot be had; nothing where it can."""
        command = [sys.executable, "-m", "pip", *words, f"{wheel}[{extra}]"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=900)
        return run.stderr[-500:] if run.returncode else ""

    extras = EXTRAS if os.environ.get("DORATUNE_INSTALL") else ("train", "report", "docs")
    with ThreadPoolExecutor(4) as pool:
        failed = {extra: problem for extra, problem in zip(extras, pool.map(resolve, extras)) if problem}
    assert failed == {}
