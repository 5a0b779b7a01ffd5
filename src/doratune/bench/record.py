"""What a run's figures depend on, and one JSON file a measurement, whole or absent: `<what>_<device type>.json`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..support.environment import environment
from ..support.files import write_json
from .settings import BenchSettings


def facts(settings: BenchSettings) -> dict:
    """The environment, and the settings."""
    own = {key: value for key, value in dataclasses.asdict(settings).items() if key != "output"}
    return environment(settings.torch_device()) | {"settings": own}


def write(folder: Path, what: str, run_facts: dict, result: dict) -> Path:
    """Write one measurement.

    Returns:
        The file's path.
    """
    quantize = run_facts["settings"]["quantize"]
    path = folder / f"{what}_{run_facts['device_type']}{'' if quantize == 'none' else '_' + quantize}.json"
    write_json(path, {"what": what, "facts": run_facts, "result": result})
    return path
