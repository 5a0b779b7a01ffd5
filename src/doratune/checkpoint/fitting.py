"""Does an adapter folder fit a model, and putting its values in.

Everything is checked against the model before it is touched: which modules the folder speaks of, every tensor and shape it needs,
VeRA's shared pair, convolutions whose filters PEFT keeps in a form of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from ..layers.shares import at_hand, put_value
from ..layers.wrappers import module_at, plain_state
from ..support.model_folders import embeddings_of
from ..support.patterns import NamePattern
from . import base_weights, peft, values
from .names import both_halves, plain_names
from .tensors import Key, expected, fitted, gain_into_factors, of_file, shown
from .values import read_starts


@dataclass
class Fit:
    """An adapter folder, resolved and checked against a model."""

    config: AdapterConfig
    selection: Selection
    tensors: dict[Key, Tensor]
    base: dict[str, Tensor]
    """Base weights that the folder holds, by their paths in the model."""
    starts: dict[str, Tensor]
    """Layer → m₀, of relative magnitudes."""


def fit(model: nn.Module, folder: Path, config: AdapterConfig, raw: dict, tensors: dict[Key, Tensor]) -> Fit:
    """Resolve and check what `read_folder` returned; the model is not touched.

    Raises:
        UserError: what does not fit, all mismatches in one message.
    """
    config, raw, tensors = plain_names(model, config, raw, tensors, str(folder))
    selection, config = resolve(model, config, raw, tensors, str(folder))
    base, tensors = base_weights.split(model, selection.ranks, selection.also_train, tensors)
    starts = read_starts(folder, {name: layer_at(model, name) for name in selection.ranks}, config)
    check(model, config, selection, tensors, str(folder), raw, base, starts)
    return Fit(config, selection, tensors, base, starts)


def _present(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """Without list entries that name nothing here: PEFT writes some by rule (`classifier` and `score`), and asks for one hit."""
    names = [name for name, _ in named_layers(model)]
    patterns = {}
    for setting in ("targets", "exclude", "also_train"):
        pattern = getattr(config, setting)
        if isinstance(pattern, tuple):
            patterns[setting] = tuple(e for e in pattern if any(name_matches((e,), name) for name in names))
        elif setting == "exclude":
            expression = NamePattern(pattern, "exclude_modules")
            patterns[setting] = pattern if any(expression.matches(name) for name in names) else ()
    if not patterns.get("targets", True) and not config.magnitude_only:
        del patterns["targets"]  # nothing left: let the selection say what is near
    return replace(config, **patterns)


def resolve(model, config: AdapterConfig, raw: dict, tensors, where: str) -> tuple[Selection, AdapterConfig]:
    """Which modules of the model the folder speaks of, with their ranks and alphas."""
    config = _present(_as_peft_saves(config, raw, model, tensors), model)
    try:
        selection = select(model, config, loading=True)
    except UserError as error:
        raise UserError(f"{where} does not fit this model: {error}{both_halves(model, tensors)}") from None
    ranks, alphas = dict(selection.ranks), dict(selection.alphas)
    if config.targets in (ALL_LINEAR, ALL_LAYERS) and isinstance(raw.get("target_modules"), list):  # less may have been left
        ranks = {name: rank for name, rank in ranks.items() if name_matches(tuple(raw["target_modules"]), name)}
    if raw.get("layers_to_transform") is not None:
        present = {name for name, _ in tensors if name}
        ranks = {name: rank for name, rank in ranks.items() if name in present}
        config = replace(config, targets=tuple(ranks))
    if raw.get("peft_type") != peft.OWN_TYPE:  # PEFT's names select modules, never batched expert weights
        ranks = {name: rank for name, rank in ranks.items() if not kind_of(layer_at(model, name)).stacked}
    if raw.get("ensure_weight_tying"):
        held = {name for name, _ in tensors} - set(ranks)
        if shared := base_weights.sharing(model, ranks, held):
            ranks |= dict.fromkeys(shared, config.rank)
            alphas |= dict.fromkeys(shared, config.alpha)
            config = replace(config, targets=tuple(ranks))
    written, rank_of, alpha_of = peft.as_written(config), *(peft.PatternValues(raw, f"{n}_pattern") for n in ("rank", "alpha"))
    for name in ranks:
        if ranks[name]:
            ranks[name] = int(rank_of.of(name, written.rank)) * config.rank // written.rank
            alphas[name] = alpha_of.of(name, written.alpha) * config.alpha / written.alpha
    overrides = {n: r for n, r in ranks.items() if r not in (0, config.rank)}
    config = replace(
        config,
        rank_overrides=overrides,
        alpha_overrides={n: alphas[n] for n in ranks if ranks[n] and alphas[n] != config.alpha},
    )
    return Selection(ranks, alphas, selection.left_out, selection.also_train), config


def _as_peft_saves(config: AdapterConfig, raw: dict, model: nn.Module, tensors) -> AdapterConfig:
    """With `also_train` as PEFT means it, where the folder is PEFT's own: every module whose name ends so, and with
    `ensure_weight_tying` those tied to them."""
    if not config.also_train or raw.get("peft_type") == peft.OWN_TYPE or peft.OWN_FILE in raw:
        return config
    names = peft.ending_so(config.also_train, [name for name, _ in named_layers(model) if name])
    if raw.get("ensure_weight_tying"):
        held = {key.rpartition(".")[0] for name, key in tensors if not name}
        names += base_weights.sharing(model, names, held - set(names))
    return replace(config, also_train=tuple(names) or config.also_train)


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
        for key, t in plain_state(modules[name]).items():
            shapes["", f"{name}.{key}"] = tuple(t.shape)
    return shapes


def check(model, config: AdapterConfig, selection: Selection, tensors, where: str, raw: dict, base=None, starts=None) -> None:
    """Every tensor the model needs is there, fits, is what it may be, and none is left over: all mismatches in one message."""
    shapes = needed(model, config, selection)
    direction = direction_of(config.method)
    shared = [("", name) for name in direction.shared_names]
    layers = {name: layer_at(model, name) for name in selection.ranks}
    whole = {f"{n}.{k}": t for n in selection.also_train for k, t in plain_state(module_at(model, n)).items()}
    misfits = [
        f"{shown(key)} has shape {tuple(tensors[key].shape)}, the model needs {shape}{_resize(model, key, tensors)}"
        for key, shape in shapes.items()
        if key in tensors and fitted(tensors[key], shape).shape != torch.Size(shape)
    ]
    sizes = list(needed_sizes(model, selection).values())
    groups = [
        [f"{shown(k)} is missing" for k in shapes if k not in tensors],
        [f"{shown(k)} fits nothing in the model" for k in tensors if k not in shapes and k not in shared],
        misfits,
        values.problems({key: t for key, t in tensors.items() if key in shapes or key in shared}, whole),
        values.relative_problems(config, tensors, layers, starts or {}),
        base_weights.problems(model, base or {}),
        [problem for problem in [direction.shared_problem(shared_of(tensors, direction), sizes, config.rank)] if problem],
        peft.filter_problems(layers) if raw.get("peft_type") == peft.PEFT_TYPE else [],
        peft.axis_problems(config, layers) if raw.get("peft_type") != peft.OWN_TYPE else [],
    ]
    if problems := [listed(group, 4) for group in groups if group]:
        raise UserError(f"{where} does not fit this model: {', '.join(problems)}{both_halves(model, tensors)}")


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


@torch.no_grad()
def put(model: nn.Module, tensors: dict[Key, Tensor]) -> None:
    """Copy checked tensors into an attached model."""
    record = record_of(model)
    for name, module in adapters(model):
        put_layer(name, module, tensors)
    for name in record.also_train:
        for key, t in plain_state(module_at(model, name)).items():
            put_value(t, tensors["", f"{name}.{key}"])


@torch.no_grad()
def put_starts(model: nn.Module, starts: dict[str, Tensor]) -> None:
    """m₀ of relative magnitudes as it was when they were saved, m as it is."""
    for name, layer in adapters(model):
        m0 = starts.get(name)
        if m0 is not None and layer.adapted.relative:
            with at_hand(layer, layer.adapted.names, write=layer.adapted.names):
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
    with at_hand(module, names=()):
        gain = a.magnitude and a.rank and a.direction.plain and not a.kind.stacked and a.facts.frozen is not None
    with at_hand(module, None if gain else a.names, write=a.names):
        _put_values(module, values, tensors)
        if gain:
            gain_into_factors(module, values["magnitude"])
    a.changed()


def _put_values(module: nn.Module, values: dict[str, Tensor], tensors: dict[Key, Tensor]) -> None:
    a, own = module.adapted, own_parameters(module)
    for parameter, t in of_file(a.kind, a.direction, values, a.rank).items():
        own[parameter].copy_(t)
    if a.relative:
        m, m0 = values["magnitude"].to(own["magnitude_start"]), own["magnitude_start"]
        own["magnitude_delta"].copy_(torch.where((m > 0) & (m0 > 0), m / m0, 1.0).log())
    elif a.magnitude:
        own["magnitude"].copy_(values["magnitude"])
    if shared := shared_of(tensors, a.direction):
        a.direction.take_shared(shared)
