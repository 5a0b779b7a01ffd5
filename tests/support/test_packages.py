"""What an environment lacks is said with the line that brings it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import doratune
from doratune.cli.main import main
from doratune.support import packages
from doratune.support.packages import Wish, install_line, wishes


def test_every_extra_is_read_from_the_metadata():
    names = {(wish.extra, wish.distribution) for wish in wishes()}
    assert {("", "torch"), ("train", "transformers"), ("quantized", "bitsandbytes"), ("dev", "pytest")} <= names


@pytest.mark.parametrize(
    ("line", "wish"),
    [
        ("torch>=2.6", ("torch", ">=2.6", "")),
        ('jsonargparse[signatures]>=4.40; extra == "train"', ("jsonargparse", ">=4.40", "train")),
        ("PyYAML (>=6,<7) ; extra == 'train'", ("PyYAML", ">=6,<7", "train")),
        ("numpy", ("numpy", "", "")),
        ('triton>=3.0; platform_system == "Nowhere" and extra == "dev"', None),
    ],
)
def test_a_requirement_is_read(line, wish, monkeypatch):
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda name: [line])
    assert [tuple(w) for w in wishes()] == ([] if wish is None else [wish])


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("yaml", "pip install 'doratune[train]'"),
        ("bitsandbytes.nn", "pip install 'doratune[quantized]'"),
        ("plotly", "pip install 'doratune[report]'"),
        ("xdist", "pip install 'doratune[dev]'"),
        ("lm_eval", "pip install 'doratune[harness]'"),
        ("wandb", "pip install 'doratune[wandb]'"),
        ("mlflow", "pip install 'doratune[mlflow]'"),
        ("trackio", "pip install 'doratune[trackio]'"),
        ("safetensors", "pip install doratune"),
        ("a_users_module", "pip install a_users_module"),
    ],
)
def test_a_missing_module_names_the_extra_that_brings_it(module, line):
    assert install_line(module) == line


def test_a_version_outside_its_range_does_not_fit():
    assert Wish("torch", ">=2.6", "").fits() and not Wish("torch", "<2", "").fits()


def test_the_doctor_finds_nothing_here_and_says_what_runs(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["problems"] == [] and "torch" in report["facts"]["core"]


@pytest.mark.parametrize(
    ("requirements", "line"),
    [
        (["torch<2"], "is not <2; pip install doratune"),
        (['nowhere>=1; extra == "train"', 'peft; extra == "train"'], "nowhere is missing; pip install 'doratune[train]'"),
        (['torch<2; extra == "dev"'], "is not <2; pip install 'doratune[dev]'"),
    ],
)
def test_the_doctor_names_what_has_to_be_mended(requirements, line, monkeypatch, capsys):
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda name: requirements)
    assert main(["doctor"]) == 2
    assert line in next(text for text in capsys.readouterr().out.splitlines() if text.startswith("mend"))


@pytest.mark.parametrize("beside", ["", "Jinja2", "PyYAML", "typing_extensions", "MarkupSafe>=99"])
def test_an_extra_that_is_not_installed_is_no_fault(beside, monkeypatch, capsys):
    """Nor one of which another package happens to need a part."""
    lines = ['nowhere; extra == "train"'] + ([f'{beside}; extra == "train"'] if beside else [])
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda name: lines)
    assert main(["doctor"]) == 0
    assert "not installed: pip install 'doratune[train]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("library", "line"),
    [
        ("PIL", "needs PIL; pip install 'doratune[vision]'"),
        ("SentencePiece", "needs SentencePiece; pip install 'doratune[train]'"),
        ("Torchvision", "needs Torchvision; pip install torchvision"),
    ],
)
def test_what_a_class_of_transformers_lacks_is_the_extra(library, line):
    """The texts are transformers' own."""
    from transformers.utils import import_utils

    texts = [getattr(import_utils, name) for name in dir(import_utils) if name.endswith("_IMPORT_ERROR")]
    (text,) = {text for text in texts if f"requires the {library} library but" in text}
    assert packages.wanted_by(text.format("AutoThing")) == line


def test_images_without_pillow_are_one_line(tmp_path, tiny_folder):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    code = "import sys; sys.modules |= {'PIL': None, 'PIL.Image': None}; "
    code += "from doratune.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["train", "--objective", "image_classification", "--model", str(tiny_folder), "--data", "photos", "--output", "run"]
    run = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    lines = [line for line in run.stderr.splitlines() if line.startswith("doratune")]
    assert run.returncode == 2 and lines == ["doratune train: needs PIL; pip install 'doratune[vision]'"], run.stderr[-1000:]
    assert not (tmp_path / "run").exists()


BROKEN = {
    "missing": ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "torch: missing; install the build"),
    "a part of it missing": ("import no_such_part", "it needs no_such_part; pip install no_such_part"),
    "a library missing": ("raise OSError('libcudart.so.99: cannot open shared object file')", "does not load (libcudart.so.99"),
    "another version": ("from math import no_such_name", "does not load (cannot import name 'no_such_name'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_torch_that_does_not_load_is_what_the_doctor_says_and_one_line_elsewhere(fault, tmp_path):
    text, line = BROKEN[fault]
    (tmp_path / "torch.py").write_text(text)
    source = str(Path(doratune.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), source])}

    def run(*words):
        command = [sys.executable, "-m", "doratune", *words]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)

    doctor = run("doctor", "--json")
    assert doctor.returncode == 2 and doctor.stderr == "", doctor.stderr
    assert line in doctor.stdout and any(line in problem for problem in json.loads(doctor.stdout.splitlines()[-1])["problems"])
    other = run("inspect", "--model", "x")
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1 and other.stderr.startswith("doratune inspect: "), (
        other.stderr
    )


@pytest.mark.parametrize("arguments", [["--version"], ["doctor", "--help"]])
def test_the_module_runs_as_the_command_does_and_needs_no_extra(arguments):
    blocked = "import sys; sys.modules |= dict.fromkeys(('yaml', 'jsonargparse', 'transformers')); import runpy; "
    code = blocked + f"sys.argv = ['doratune', *{arguments}]; runpy.run_module('doratune', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "doratune" in run.stdout and run.stderr == ""


def test_help_shows_every_setting():
    import doratune
    from doratune.config import AdapterConfig

    assert all(f"    {name}: " in AdapterConfig.__doc__ for name in AdapterConfig.__dataclass_fields__)
    assert doratune.training.__name__ == "doratune.training"


@pytest.mark.parametrize("words", [["demo", "--help"], ["demo", "--resume"], ["chat", "--help"], ["merge", "--help"]], ids=" ".join)
def test_help_and_wrong_flags_load_nothing_that_trains(words):
    heavy = ("datasets", "pandas", "hqq", "torch._dynamo", "accelerate")
    code = f"import sys; from doratune.cli.main import main\ntry: main({words})\nexcept SystemExit: pass\n"
    code += f"print('loaded', [name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.stdout.splitlines()[-1] == "loaded []", run.stdout[-300:]
