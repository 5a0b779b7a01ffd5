"""Standard error holds what doratune says; what other packages tell their own developers while they load is left out."""

import os
import subprocess
import sys

import pytest

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def errors(folder, *words, options=()):
    command = [sys.executable, *options, "-m", "doratune", *words]
    run = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    return run.returncode, run.stderr.splitlines()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["train", "--data", "no_such_file.json"], 2),
        (["compare"], 2),
        (["demo", "--help"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_only_our_own_line(words, status, tmp_path):
    """Each of these loads everything that training needs."""
    found, lines = errors(tmp_path, *words)
    assert found == status
    assert len(lines) == bool(status) and all(line.startswith(f"doratune {words[0]}: ") for line in lines), lines


def test_who_asks_for_warnings_gets_them(tmp_path):
    code = "import warnings; from doratune.cli.main import quiet_others; quiet_others(); warnings.warn('mine', FutureWarning)"
    for options, shown in (((), False), (("-W", "always"), True)):
        run = subprocess.run([sys.executable, *options, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0 and ("mine" in run.stderr) == shown
