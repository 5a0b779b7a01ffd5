"""What a run's figures depend on, and one JSON file a measurement, whole or absent.

<what>_<device type>.json                           dense bases, as many threads as the machine gives
<what>_<device type>_nf4.json                       over a quantized base (`--quantize`)
<what>_<device type>_llama-768-shape.json           of a shape that stands beside the main model (`shapes.BESIDE`)
…_1_thread.json                                     the same with one thread (`--threads 1`)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..support.environment import environment
from ..support.files import write_json
from .settings import BenchSettings
from .shapes import BESIDE


def facts(settings: BenchSettings) -> dict:
    """The environment, and the settings."""
    own = {key: value for key, value in dataclasses.asdict(settings).items() if key != "output"}
    return environment(settings.torch_device()) | {"settings": own}


def variant(settings: BenchSettings) -> str:
    """What sets a model's results apart from the main model's: its storage or its shape; "" for the main model."""
    return settings.quantize if settings.quantize != "none" else settings.model if settings.model in BESIDE else ""


def with_threads(what: str, threads: int) -> str:
    """The name of a measurement with this many threads; 0: as many as the machine gives."""
    return f"{what}_{threads}_thread{'s' if threads > 1 else ''}" if threads else what


def write(folder: Path, what: str, run_facts: dict, result: dict, variant: str = "", threads: int = 0) -> Path:
    """Write one measurement.

    Returns:
        The file's path.
    """
    name = "_".join(part for part in (what, run_facts["device_type"], variant) if part)
    path = folder / f"{with_threads(name, threads)}.json"
    write_json(path, {"what": what, "facts": run_facts, "result": result})
    return path
