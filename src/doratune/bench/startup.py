"""What is paid once: importing the package, and attaching an adapter to a model of many small layers.

Each figure is the least of a few trials, in seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from torch import nn

from .arms import attach_arm, share

TRIALS = 3
PACKAGES = Path(__file__).resolve().parents[2]
"""The folder that this package is imported from."""
CODE = """
import time, torch
start = time.perf_counter()
import doratune
imported = time.perf_counter()
doratune.attach, doratune.AdapterConfig
print(imported - start, time.perf_counter() - imported)
"""


def import_seconds() -> dict[str, float]:
    """In a process of its own that has imported torch: `import` of the package, and its first use beyond that."""
    path = os.pathsep.join(part for part in (str(PACKAGES), os.environ.get("PYTHONPATH")) if part)
    trials = []
    for _ in range(TRIALS):
        run = subprocess.run(
            [sys.executable, "-c", CODE], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
        )
        trials.append([float(word) for word in run.stdout.split()])
    imported, first_use = (min(times) for times in zip(*trials, strict=True))
    return {"import": imported, "first use": first_use}


def attach_seconds(name: str, base: nn.Module, targets: list[str], rank: int) -> float:
    """Of the arm `name`, to a copy of `base` over the same weights; the copy is not timed."""

    def trial() -> float:
        model = share(base)
        start = time.perf_counter()
        attach_arm(name, model, targets, rank)
        return time.perf_counter() - start

    return min(trial() for _ in range(TRIALS))
