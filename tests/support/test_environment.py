"""How the commands' processes share a machine."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
sys.argv = ["doratune", "--version"]
from doratune.cli.main import entry
try:
    entry()
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
        ({"OMP_WAIT_POLICY": "passive"}, "None"),
    ],
)
def test_threads_wait_as_the_user_says_else_they_sleep_soon(said, wanted):
    """Set before torch is there, whose OpenMP reads it once."""
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run([sys.executable, "-c", CODE], env=plain | said, capture_output=True, text=True, check=True)
    assert run.stdout.split()[-2:] == [wanted, "False"]
