"""Every Python that the package is for, as far as this machine has it: the source compiles without a warning, and what needs no
torch runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = ("3.10", "3.11", "3.12", "3.13", "3.14")
COMPILE = """
import pathlib, sys, warnings
warnings.simplefilter("error")
for path in pathlib.Path(sys.argv[1]).rglob("*.py"):
    compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)
print("%d.%d" % sys.version_info[:2])
"""


def interpreter(version: str) -> str | None:
    """A working Python of this version: on the path, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for path in filter(None, found):
        run = subprocess.run([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True)
        if run.returncode == 0 and run.stdout.strip() == version:
            return path
    return None


@pytest.mark.parametrize("version", SUPPORTED)
def test_the_source_compiles_and_help_runs(version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"this machine has no Python {version}")
    for folder in ("src", "tests", "benchmarks"):
        run = subprocess.run([python, "-c", COMPILE, str(ROOT / folder)], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0 and run.stdout.strip() == version, run.stderr[-1000:]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    for words in (["--help"], ["--version"], ["no_such_command"]):
        run = subprocess.run([python, "-m", "doratune", *words], env=environment, capture_output=True, text=True, timeout=60)
        assert run.returncode == (2 if words == ["no_such_command"] else 0) and "Traceback" not in run.stderr, run.stderr


def test_this_python_is_one_of_them():
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in SUPPORTED


def test_pins_are_for_the_pythons_that_their_versions_are_for():
    """make setup works on the oldest Python: a version that is not for it is not asked for there."""
    import importlib.metadata
    import re

    specifiers = pytest.importorskip("packaging.specifiers")
    wrong = []
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, version, marker = re.fullmatch(r"([\w.-]+)==([^;\s]+)\s*(?:;\s*(.*))?", line).groups() if "==" in line else ("",) * 3
        try:
            metadata = importlib.metadata.metadata(name) if name else {}
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted = metadata.get("Requires-Python") if metadata.get("Version") == version else None
        if (
            wanted
            and not specifiers.SpecifierSet(wanted).contains(f"{SUPPORTED[0]}.13")
            and not (marker or "").startswith("python_version")
        ):
            wrong.append(line)
    assert wrong == []
