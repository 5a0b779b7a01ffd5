"""A baseline on disk: baseline_config.json + baseline_model.safetensors (fp32), checked before the model is touched."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import UserError, listed, near_misses
from ..support.files import read_json, read_tensors, write_json, write_tensors
from ..support.folders import generation, recover, steady
from .attach import attach_shapes, parameters, record_of, refuse_attached, shapes
from .config import BaselineConfig

CONFIG, TENSORS = "baseline_config.json", "baseline_model.safetensors"


def is_baseline(folder: str | Path) -> bool:
    """Does a folder hold a baseline?"""
    return (Path(folder) / CONFIG).is_file()


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the attached baseline.

    Raises:
        UserError: nothing is attached.
    """
    record, folder = record_of(model), Path(folder)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    described = {"doratune_version": __version__, "base_model_name_or_path": base, "baseline": record.config.to_dict()}
    with generation(folder, lambda name: name not in (CONFIG, TENSORS), key=CONFIG) as stage:
        write_tensors(stage / TENSORS, dict(parameters(model)))
        write_json(stage / CONFIG, described)


def base_model_of(folder: str | Path) -> str:
    """Name of the base model that a baseline's folder records.

    Raises:
        UserError: none is recorded.
    """
    name = read_json(Path(folder) / CONFIG, "a baseline's folder needs it").get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{Path(folder) / CONFIG} records no base model; give --model")
    return name


def load(model: nn.Module, folder: str | Path, trainable: bool = False) -> nn.Module:
    """Attach the baseline in `folder` to a model, in place. Returns the model.

    Args:
        trainable: leave its parameters trainable (to go on training); False for inference.

    Raises:
        UserError: a missing, corrupt or ill-typed file, or tensors that do not fit the model. The model is then unchanged.
    """
    config, tensors = read_folder(Path(folder))
    refuse_attached(model)
    module_shapes = shapes(model, config)
    wanted = {f"{name}.{key}": shape for name, keys in module_shapes.items() for key, shape in keys.items()}
    _check(tensors, wanted, Path(folder) / TENSORS)
    attach_shapes(model, config, module_shapes, trainable)
    _put(model, tensors)
    return model


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Put the tensors of a folder into a model that has the same baseline attached (resuming).

    Raises:
        UserError: as `load`, or another baseline than the attached one.
    """
    config, tensors = read_folder(Path(folder))
    here = record_of(model).config.to_dict()
    for name, value in config.to_dict().items():
        if name != "seed" and value != here[name]:
            raise UserError(
                f"{Path(folder) / CONFIG} says {name} {value!r}, the attached baseline {here[name]!r}; use the same settings"
            )
    _check(tensors, {name: tuple(p.shape) for name, p in parameters(model).items()}, Path(folder) / TENSORS)
    _put(model, tensors)


def read_folder(folder: Path) -> tuple[BaselineConfig, dict[str, Tensor]]:
    """(config, tensors) of a folder, nothing checked against a model."""
    recover(folder)
    return steady(folder, lambda: _read(folder))


def _read(folder: Path) -> tuple[BaselineConfig, dict[str, Tensor]]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one with {CONFIG}")
    settings = read_json(folder / CONFIG, "a baseline's folder needs it").get("baseline")
    if not isinstance(settings, dict):
        raise UserError(f"{folder / CONFIG} has no object 'baseline'; save the baseline again")
    try:
        config = BaselineConfig.from_dict(settings)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    return config, read_tensors(folder / TENSORS)


def _check(tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], path: Path) -> None:
    """Every tensor is there, none besides, each of its shape and with finite numbers: all problems in one message."""
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} has no place in this model{near_misses(name, wanted, 1)}" for name in tensors if name not in wanted]
    for name in wanted.keys() & tensors.keys():
        value = tensors[name]
        if tuple(value.shape) != tuple(wanted[name]):
            problems.append(f"{name} is {tuple(value.shape)}, expected {tuple(wanted[name])}")
        elif not value.is_floating_point() or not torch.isfinite(value).all():
            problems.append(f"{name} holds other things than finite numbers")
    if problems:
        raise UserError(f"{path} does not fit: {listed(sorted(problems), 3)}; use the model that it was trained on")


@torch.no_grad()
def _put(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, p in parameters(model).items():
        p.copy_(tensors[name])
