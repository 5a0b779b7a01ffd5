"""docs/performance.md, from the JSON files of `doratune bench`.

No figure is written by hand; what was not measured says so.
"""

from __future__ import annotations

from pathlib import Path

from ..support.files import read_json, replacing
from ..support.models import QUANTIZATIONS
from .sections import device_sections
from .settings import MEASUREMENTS
from .shapes import BESIDE
from .tables import NOT_MEASURED, WAYS
from .targets import Results, targets

INTRODUCTION = """\
Written by `python benchmarks/report.py` from the files that `doratune bench` leaves in `benchmarks/results/`; no figure by hand.

Arms run in turn, step by step, in one process; every ratio is formed within a round; shown are the median and the 20th and 80th
percentile. Targets are about wall time with as many threads as the machine gives, and on CPU also about the CPU time of one
thread, measured by itself: with several, CPU time counts those that spin while they wait. `lora` and `dora` are this package,
`lora_peft` and `dora_peft` are PEFT, unmodified; `frozen` is the base alone with its whole chain of input gradients; `dora_dense`
is DoRA with W + s·B·A formed in full. Ratios of bytes are of those alive after the forward."""


def write_report(root: Path, results_folder: Path | None = None) -> Path:
    """Write docs/performance.md of the checkout at `root`; returns its path.

    Args:
        results_folder: where the JSON files are; default benchmarks/results.

    Raises:
        UserError: a results file cannot be read; nothing is then written.
    """
    folder = results_folder or root / "benchmarks" / "results"
    cpu, gpu = (read_results(folder, device) for device in ("cpu", "cuda"))
    page, content = root / "docs" / "performance.md", performance_page(cpu, gpu)
    with replacing(page) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return page


def read_results(folder: Path, device: str) -> Results:
    """The measurements of `folder` on one type of device, by measurement, variant and threads."""
    found = {}
    for what in MEASUREMENTS:
        for variant in ("", *(f"_{name}" for name in (*QUANTIZATIONS, *BESIDE))):
            for way in WAYS[device]:
                path = folder / f"{what}_{device}{variant}{way.suffix}.json"
                if path.is_file():
                    found[what + variant + way.suffix] = read_json(path, "run doratune bench again")
    return found


def performance_page(cpu: Results, gpu: Results) -> str:
    """The whole of docs/performance.md."""
    parts = ["# Performance", INTRODUCTION, "## Targets", targets(cpu, gpu)]
    for title, results, device in (("CPU", cpu, "cpu"), ("GPU", gpu, "cuda")):
        missing = f"{NOT_MEASURED}; `doratune bench --device {device}` measures it"
        parts += [f"## {title}", *(device_sections(results, device) if results else [missing])]
    for results, device in ((cpu, "cpu"), (gpu, "cuda")):
        for name in (*BESIDE, *QUANTIZATIONS):
            wanted = name in BESIDE and device == "cpu"
            title = f"## {name} ({device.upper()})" if name in BESIDE else f"## Base in {name} ({device.upper()}): QLoRA and QDoRA"
            sections = device_sections(results, device, name, all=wanted)
            parts += [title, *sections] if sections else []
    return "\n\n".join(parts) + "\n"
