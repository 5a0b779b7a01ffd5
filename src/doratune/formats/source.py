"""What a file or folder holds, before anybody says what it means: tensors, safetensors metadata, JSON settings beside them.

safetensors, or a pickle of nothing but tensors (`torch.load` with `weights_only=True`), which never runs code. A folder stands for
the one file of weights in it. Cost: the tensors, on the CPU.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, kind_in_words, listed
from ..support.files import open_tensors, parse_json, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SETTINGS = "adapter_config.json"
WEIGHTS = (
    "adapter_model.pt", "adapters.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors",
    "pytorch_lora_weights.bin", "adapter_model.bin",
)  # fmt: skip
"""Names that programs give to an adapter's weights in a folder, in the order in which one is taken: torchtune puts its own file
beside an export to PEFT that has m in the wrong order."""
_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass
class Source:
    """A file of tensors with its settings."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of modules that were trained whole, which LLaVA keeps in a file of their own."""

    def holding(self) -> str:
        """`24 tensors: 12 × lora_down.weight, 12 × lora_up.weight`, by the ends of their names."""
        ends = Counter(_ending(key) for key in self.tensors)
        return f"{len(self.tensors)} tensors: " + listed((f"{count} × {end}" for end, count in ends.most_common()), 12)


def source_of(path: Path) -> Source | None:
    """The tensors and settings at `path`; None: a folder without such files, or one of PEFT's type.

    Raises:
        UserError: no such file, a damaged one, a pickle that holds more than tensors, several files of weights.
    """
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLES):
            return None
        if path.name in _PEFT_WEIGHTS and _is_peft(path.parent):
            raise UserError(f"{path} is a file of an adapter folder; give the folder {path.parent}")
        tensors, metadata = read_weights(path)
        return Source(path, tensors, metadata, _settings(path.parent))
    weights = weights_in(path) if path.is_dir() else None
    if weights is None or (weights.name in _PEFT_WEIGHTS and _is_peft(path)):
        return None
    tensors, metadata = read_weights(weights)
    further = path / "non_lora_trainables.bin"
    beside = read_weights(further)[0] if further.is_file() else {}
    return Source(path, tensors, metadata, _settings(path), beside)


def _is_peft(folder: Path) -> bool:
    """Is it PEFT's or ours, however damaged: not the authors', which have the same file names?"""
    try:
        return _settings(folder).get("peft_type") != "DORA"
    except UserError:
        return True


def weights_in(folder: Path) -> Path | None:
    """The file of weights that a folder stands for: of a name that programs use, or the only one where no settings are."""
    if known := next((folder / name for name in WEIGHTS if (folder / name).is_file()), None):
        return known
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (".safetensors", *PICKLES))
    numbered = [p for p in files if re.fullmatch(r"adapter_\d+", p.stem)]
    if len(numbered) > 1:
        raise UserError(f"{folder} holds several adapters ({listed(p.name for p in numbered)}); give the file that is meant")
    described = any((folder / name).exists() for name in (SETTINGS, "baseline_config.json", "config.json"))
    return numbered[0] if numbered else files[0] if len(files) == 1 and not described else None


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    return read_json(path, "it belongs to the adapter") if path.is_file() else {}


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, or of a pickle that holds tensors and nothing else."""
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return _checked(path, tensors), file.metadata() or {}
    if path.suffix not in PICKLES:
        raise UserError(f"{path}: expected a file of weights (.safetensors, {', '.join(PICKLES)})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it then refuses
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{path} is a pickle that holds more than tensors, or damaged ({reason[:120]}): it is not loaded, since that could "
            "run code; save it as safetensors"
        ) from None
    if isinstance(loaded, dict) and set(loaded) == {"state_dict"}:
        loaded = loaded["state_dict"]
    return _checked(path, loaded), {}


def _checked(path: Path, tensors) -> dict[str, Tensor]:
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} holds no tensors by name; expected an adapter's weights")
    strange = [repr(key) for key, t in tensors.items() if not isinstance(key, str) or not isinstance(t, Tensor)]
    if strange:
        raise UserError(f"{path} holds values that are no tensors: {listed(strange)}; expected an adapter's weights")
    whole = [key for key, t in tensors.items() if not (t.is_floating_point() or t.numel() == 1)]
    if whole:
        raise UserError(f"{path} holds tensors that are no floating-point numbers: {listed(whole)}; save them unquantized")
    return tensors


def json_object(text: str | None, what: str) -> dict[str, Any]:
    """A JSON object out of a safetensors header; nothing where there is none."""
    if not text:
        return {}
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON ({error}); write the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} holds {kind_in_words(value)}, expected a JSON object")
    return value


def _ending(key: str) -> str:
    """The end of a tensor's name: from the last piece that is not `weight` or `default`."""
    pieces = key.split(".")
    count = next((i for i, piece in enumerate(reversed(pieces), 1) if piece not in ("weight", "bias", "default")), len(pieces))
    return ".".join(pieces[-count:])
