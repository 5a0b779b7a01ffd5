"""What a run's figures depend on, and one JSON file a measurement, whole or absent: `<what>_<device type>.json`."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from ..checkpoint.files import write_json
from .settings import BenchSettings

PACKAGE = Path(__file__).resolve().parents[1]


def facts(settings: BenchSettings) -> dict:
    """Date (UTC), device, threads, versions, the commit of a checkout, and the settings."""
    device = settings.torch_device()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__} | {name: _version(name) for name in ("transformers", "peft", "doratune")},
        "commit": commit(),
        "settings": {key: value for key, value in dataclasses.asdict(settings).items() if key != "output"},
    }


def cpu_name() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Short hash of the checkout that this package runs from, "-dirty" where the package is modified; None outside of one."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head, modified = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "--", ".")
    return f"{head}-dirty" if head and modified else head


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def write(folder: Path, what: str, run_facts: dict, result: dict) -> Path:
    """Write one measurement.

    Returns:
        The file's path.
    """
    quantize = run_facts["settings"]["quantize"]
    path = folder / f"{what}_{run_facts['device_type']}{'' if quantize == 'none' else '_' + quantize}.json"
    write_json(path, {"what": what, "facts": run_facts, "result": result})
    return path
