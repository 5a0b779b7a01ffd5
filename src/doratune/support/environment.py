"""What a run's figures depend on: machine, versions, commit; and the memory it took."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

PACKAGE = Path(__file__).resolve().parents[1]


def environment(device: torch.device | None = None) -> dict:
    """Date (UTC), device, threads, versions and the commit of a checkout.

    Args:
        device: default: the first GPU where there is one, else the CPU.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__} | {name: _version(name) for name in ("transformers", "peft", "doratune")},
        "commit": commit(),
    }


def peak_bytes() -> int:
    """Peak memory: of the GPU where one was used, else of the process; 0 where the system does not tell."""
    if torch.cuda.is_available() and (used := torch.cuda.max_memory_allocated()):
        return used
    if resource is None:
        return _peak_of_windows()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_of_windows() -> int:
    try:
        import psutil
    except ModuleNotFoundError:
        return 0
    return getattr(psutil.Process().memory_info(), "peak_wset", 0)


def memory_bytes() -> int:
    """This machine's memory."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import psutil  # comes with accelerate

    return psutil.virtual_memory().total


def cpu_name() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
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
