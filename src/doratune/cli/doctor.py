"""`doratune doctor`: what this environment has and lacks, each fault with the line that mends it.

Runs on the core alone: its options are read by the standard library, and no extra is imported.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys

from .description import CommandLine, answer
from .output import print_json, refuse_in_one_line, say, say_help

WHAT = "Look at Python, torch, the devices and the packages of every extra. Exit status 2 where something has to be mended."


def main(argv: list[str]) -> int:
    answer(argv, CommandLine())
    parser = argparse.ArgumentParser("doratune doctor", description=WHAT, epilog="example: doratune doctor", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="the same as JSON on the last line")
    say_help(parser)
    refuse_in_one_line(parser)
    as_json = parser.parse_args(argv).json
    from ..support.tables import aligned

    facts, extras, problems = machine(), packages(), []
    problems += [f"{name}: {problem}" for name, _, problem in (*facts, *extras) if problem]
    say("\n".join(aligned(("", "here"), [(name, value) for name, value, _ in (*facts, *extras)])))
    for problem in problems:
        say(f"mend   {problem}")
    say("nothing has to be mended" if not problems else f"{len(problems)} to mend")
    if as_json:
        print_json({"facts": {name: value for name, value, _ in (*facts, *extras)}, "problems": problems})
    return 2 if problems else 0


def machine() -> list[tuple[str, str, str]]:
    """(name, what is here, problem or "") of Python, torch and the devices."""
    from .. import __version__

    python = "" if sys.version_info >= (3, 10) else "too old; install Python 3.10 or newer"
    rows = [("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", python)]
    if fault := torch_fault():
        return [("doratune", __version__, ""), *rows, ("torch", *fault)]
    import torch

    from ..support.environment import commit, cpu_name

    at = commit()
    rows = [
        ("doratune", __version__ + (f" ({at})" if at else ""), ""),
        *rows,
        ("torch", torch.__version__, ""),
        ("CPU", f"{cpu_name()}, {torch.get_num_threads()} threads", ""),
        ("GPU", *gpu()),
    ]
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        rows.append(("model hub", "off: HF_HUB_OFFLINE is set, only local folders and cached models load", ""))
    return rows


def torch_fault() -> tuple[str, str] | None:
    """(what is here, problem) where torch cannot be imported; None where it can."""
    try:
        import torch as torch
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return "missing", "missing; install the build for this machine, see pytorch.org/get-started"
        return "does not load", f"does not load: it needs {error.name}; pip install {error.name}"
    except (ImportError, OSError) as error:  # a library of CUDA that is not there, a wheel for another machine
        reason = " ".join(str(error).split())[:200]
        return "does not load", f"does not load ({reason}); install the build for this machine again, see pytorch.org/get-started"
    return None


def gpu() -> tuple[str, str]:
    """(the accelerators that torch can use, problem or "")."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "; ".join(f"{p.name}, {p.total_memory / 2**30:.1f} GiB" for p in names), ""
    if torch.backends.mps.is_available():
        return "Apple MPS", ""
    if not shutil.which("nvidia-smi"):
        return "none", ""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            "none",
            "an NVIDIA driver is here, but torch is a CPU build; install a CUDA build, see pytorch.org/get-started",
        )
    return "none", f"torch {torch.__version__} sees no GPU of the NVIDIA driver; compare its CUDA with that of nvidia-smi"


def packages() -> list[tuple[str, str, str]]:
    """(extra, its packages with their versions or "missing", problem or ""); a missing extra is no problem, half of one is. What
    others brought along (torch, Jinja2) is no half of an extra."""
    from ..support.packages import NAME, brought_along, wishes

    brought = brought_along()
    groups: dict[str, list] = {}
    for wish in wishes():
        groups.setdefault(wish.extra, []).append(wish)
    rows = []
    for extra, members in groups.items():
        missing = [wish.distribution for wish in members if wish.installed is None]
        wrong = [f"{w.distribution} {w.installed} is not {w.versions}" for w in members if w.installed and not w.fits()]
        line = f"pip install '{NAME}[{extra}]'" if extra else f"pip install {NAME}"
        absent = bool(missing and extra) and all(wish.installed is None or wish.plain in brought for wish in members)
        faults = [] if absent else [*(f"{name} is missing" for name in missing), *wrong]
        problem = f"{', '.join(faults)}; {line}" if faults else ""
        here = "not installed: " + line if absent else ", ".join(map(_said, members))
        rows.append((f"[{extra}]" if extra else "core", here, problem))
    return rows


def _said(wish) -> str:
    return f"{wish.distribution} {wish.installed or 'missing'}"
