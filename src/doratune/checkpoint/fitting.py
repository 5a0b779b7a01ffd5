"""Does an adapter folder fit a model, and putting its values in.

Everything is checked against the model before it is touched: which modules the folder speaks of, every tensor and shape it needs,
VeRA's shared pair, convolutions whose filters PEFT keeps in a form of its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.attach import adapters, record_of
from ..adapter.targets import ALL_LAYERS, ALL_LINEAR, Selection, name_matches, select
from ..config import AdapterConfig
from ..directions import Direction, direction_for, direction_of
from ..errors import UserError, listed
from ..layers import kind_of
from ..layers.adapted import own_parameters
from ..layers.layouts import layer_at, named_layers
from ..support.files import read_tensors
from ..support.model_folders import embeddings_of
from . import peft
from .tensors import Key, expected, fitted, of_file

STARTS = "doratune_starts.safetensors"
"""m₀ of relative magnitudes, which decay pulls m to."""


def _present(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """Without list entries that name nothing here: PEFT writes some by rule (`classifier` and `score`), and asks for one hit."""
    names = [name for name, _ in named_layers(model)]
    patterns = {}
    for setting in ("targets", "exclude", "also_train"):
        pattern = getattr(config, setting)
        if isinstance(pattern, tuple):
            patterns[setting] = tuple(e for e in pattern if any(name_matches((e,), name) for name in names))
        elif setting == "exclude" and not any(name_matches(pattern, name) for name in names):
            patterns[setting] = ()
    if not patterns.get("targets", True) and not config.magnitude_only:
        del patterns["targets"]  # nothing left: let the selection say what is near
    return replace(config, **patterns)


def resolve(model, config: AdapterConfig, raw: dict, tensors) -> tuple[Selection, AdapterConfig]:
    """Which modules of the model the folder speaks of, with their ranks and alphas."""
    config = _present(config, model)
    selection = select(model, config, loading=True)
    ranks, alphas = dict(selection.ranks), dict(selection.alphas)
    if config.targets in (ALL_LINEAR, ALL_LAYERS) and isinstance(raw.get("target_modules"), list):  # less may have been left
        ranks = {name: rank for name, rank in ranks.items() if name_matches(tuple(raw["target_modules"]), name)}
    if raw.get("layers_to_transform") is not None:
        present = {name for name, _ in tensors if name}
        ranks = {name: rank for name, rank in ranks.items() if name in present}
        config = replace(config, targets=tuple(ranks))
    if raw.get("peft_type") != peft.OWN_TYPE:  # PEFT's names select modules, never batched expert weights
        ranks = {name: rank for name, rank in ranks.items() if not kind_of(layer_at(model, name)).stacked}
    for name in ranks:
        if ranks[name]:
            written = peft.as_written(config)
            ranks[name] = int(peft.pattern_value(raw.get("rank_pattern"), name, written.rank)) * config.rank // written.rank
            alphas[name] = peft.pattern_value(raw.get("alpha_pattern"), name, written.alpha) * config.alpha / written.alpha
    overrides = {n: r for n, r in ranks.items() if r not in (0, config.rank)}
    config = replace(
        config,
        rank_overrides=overrides,
        alpha_overrides={n: alphas[n] for n in ranks if ranks[n] and alphas[n] != config.alpha},
    )
    return Selection(ranks, alphas, selection.left_out, selection.also_train), config


def needed(model, config: AdapterConfig, selection: Selection) -> dict[Key, tuple[int, ...]]:
    """Every tensor that a file must hold for these modules, with its shape."""
    shapes: dict[Key, tuple[int, ...]] = {}
    modules = dict(named_layers(model))
    for name, rank in selection.ranks.items():
        kind, module = kind_of(modules[name]), modules[name]
        base, direction = kind.base(module), direction_for(config, rank)
        wanted = expected(kind, base, module, direction, rank, config.has_magnitude, kind.axis(config))
        shapes |= {(name, parameter): shape for parameter, shape in wanted.items()}
    for name in selection.also_train:
        for key, t in modules[name].state_dict().items():
            shapes["", f"{name}.{key}"] = tuple(t.shape)
    return shapes


def check(model, config: AdapterConfig, selection: Selection, tensors, where: str, raw: dict) -> None:
    """Every tensor the model needs is there, fits, and none is left over: all mismatches in one message."""
    shapes = needed(model, config, selection)
    direction = direction_of(config.method)
    shared = [("", name) for name in direction.shared_names]
    problems = [f"{_shown(k)} is missing" for k in shapes if k not in tensors]
    problems += [f"{_shown(k)} fits nothing in the model" for k in tensors if k not in shapes and k not in shared]
    for key, shape in shapes.items():
        if key in tensors and fitted(tensors[key], shape).shape != torch.Size(shape):
            problems.append(
                f"{_shown(key)} has shape {tuple(tensors[key].shape)}, the model needs {shape}{_resize(model, key, tensors)}"
            )
    sizes = list(needed_sizes(model, selection).values())
    if problem := direction.shared_problem(shared_of(tensors, direction), sizes, config.rank):
        problems.append(problem)
    if raw.get("peft_type") == peft.PEFT_TYPE:
        problems += peft.filter_problems({name: layer_at(model, name) for name in selection.ranks})
    if problems:
        raise UserError(f"{where} does not fit this model: " + listed(problems, 12))


def _resize(model, key: Key, tensors) -> str:
    """What to call first where a vocabulary of another size was saved."""
    table = embeddings_of(model)
    weight = getattr(table, "weight", None)
    names = {name for name, module in model.named_modules() if module is table}
    if weight is None or key[1].rpartition(".")[0] not in names:
        return ""
    return f"; call model.resize_token_embeddings({len(tensors[key])}) first"


def needed_sizes(model, selection: Selection) -> dict[str, tuple[int, int]]:
    """(O, I) of every selected layer, or of its experts."""
    modules = dict(named_layers(model))
    return {name: tuple(kind_of(modules[name]).base(modules[name]).shape(modules[name])[-2:]) for name in selection.ranks}


def _shown(key: tuple[str, str]) -> str:
    return ".".join(part for part in key if part)


@torch.no_grad()
def put(model: nn.Module, tensors: dict[Key, Tensor]) -> None:
    """Copy checked tensors into an attached model."""
    record = record_of(model)
    for name, module in adapters(model):
        put_layer(name, module, tensors)
    for name in record.also_train:
        for key, t in model.get_submodule(name).state_dict(keep_vars=True).items():
            t.detach().copy_(tensors["", f"{name}.{key}"])


@torch.no_grad()
def put_starts(model: nn.Module, folder: Path) -> None:
    """m₀ of relative magnitudes as it was when they were saved, m as it is."""
    starts = read_tensors(folder / STARTS) if (folder / STARTS).is_file() else {}
    for name, layer in adapters(model):
        m0 = starts.get(f"{name}.magnitude_start")
        if m0 is not None and layer.adapted.relative and m0.shape == layer.magnitude_start.shape:
            m = layer.magnitude.clone()
            layer.magnitude_start.copy_(m0)
            ratio = torch.where((m > 0) & (layer.magnitude_start > 0), m / layer.magnitude_start, 1.0)
            layer.magnitude_delta.copy_(ratio.log())
            layer.adapted.changed()


def shared_of(tensors: dict[Key, Tensor], direction: Direction) -> dict[str, Tensor]:
    """What the layers share (VeRA's frozen pair), as far as the file has it."""
    return {name: tensors["", name] for name in direction.shared_names if ("", name) in tensors}


@torch.no_grad()
def put_layer(name: str, module: nn.Module, tensors: dict[Key, Tensor]) -> None:
    """Copy one layer's checked tensors into its parameters, and what it shares with others."""
    a = module.adapted
    shapes = expected(a.kind, a.base, module, a.direction, a.rank, a.magnitude, a.axis)
    values = {parameter: fitted(tensors[name, parameter], shape) for parameter, shape in shapes.items()}
    own = own_parameters(module)
    for parameter, t in of_file(a.kind, a.direction, values, a.rank).items():
        own[parameter].copy_(t)
    if a.relative:
        m, m0 = values["magnitude"].to(own["magnitude_start"]), own["magnitude_start"]
        own["magnitude_delta"].copy_(torch.where((m > 0) & (m0 > 0), m / m0, 1.0).log())
    elif a.magnitude:
        own["magnitude"].copy_(values["magnitude"])
    if shared := shared_of(tensors, a.direction):
        a.direction.take_shared(shared)
    a.changed()
