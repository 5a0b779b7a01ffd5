"""`save` and `load`: an adapter folder = adapter_config.json + adapter_model.safetensors (PEFT's layout) + doratune.json.

doratune.json holds the whole AdapterConfig (training settings that PEFT's file cannot say: norm gradient, seed, magnitude-only
modules); a folder without it is PEFT's own. Everything is checked against the model before the model is touched.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..attachment import RECORD, adapters, attach_selection, record_of
from ..config import AdapterConfig
from ..directions import direction_for
from ..errors import UserError, listed
from ..layers import kind_of
from ..layers.adapted import own_parameters
from ..layers.layouts import layer_at, named_layers
from ..math.compose import no_autocast
from ..targets import Selection, name_matches, select
from . import peft
from .files import read_json, read_tensors, write_json, write_tensors
from .tensors import SHARED, Key, expected, file_key, fitted, of_file, parse_key, to_file

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "doratune.json"
FORMATS = ("auto", "peft", "doratune")


def save(model: nn.Module, folder: str | Path, format: str = "auto") -> None:
    """Write the adapter of an attached or merged model; A, B, m in fp32.

    Args:
        format: "peft" loads in PEFT; "doratune" is the same layout under our own type; "auto" takes "peft" where
            PEFT's format can say it all.

    Raises:
        UserError: nothing attached, or format "peft" for an adapter that PEFT's format cannot say (with the reason).
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    record, folder, layers = record_of(model), Path(folder), dict(adapters(model))
    config = record.config
    modules = {name: layer_at(model, name) for name in layers}
    problem = peft.cannot_say(config, {name: (layer.adaptation.kind, modules[name]) for name, layer in layers.items()})
    if format == "peft" and problem:
        raise UserError(f'{problem}; save with format="doratune"')
    ranks = {name: layer.adaptation.rank for name, layer in layers.items()}
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    transposed = all(layer.adaptation.kind.name == "Conv1D" for layer in layers.values())
    described = peft.describe(config, ranks, record.alphas, base, transposed, own=format == "doratune" or problem is not None)
    tensors: dict[Key, Tensor] = {}
    for name, layer in layers.items():
        with no_autocast(layer.adaptation.base.device(modules[name])):
            exported = to_file(layer, modules[name], config.scaling(1, record.alphas[name]))
        tensors |= {(name, parameter): t for parameter, t in exported.items()}
    if config.direction == "vera":
        shared = next(layer.adaptation.direction.shared for layer in layers.values() if layer.adaptation.rank)
        tensors |= {("", name): t.clone() for name, t in zip(SHARED, shared.get(torch.device("cpu"), torch.float32), strict=True)}
    whole = model.state_dict(keep_vars=True)
    for name in record.also_train:
        tensors |= {("", key): t.detach().clone() for key, t in whole.items() if key.startswith(name + ".")}
    write_tensors(folder / TENSORS, {file_key(key): t for key, t in tensors.items()})
    write_json(folder / CONFIG, described | {"task_type": _task_type(model)})
    own = {"doratune_version": __version__, "adapter": config.to_dict()}
    if any(layer.adaptation.base.name != "dense" for layer in layers.values()) and (quantization := _quantization(model)):
        own["quantization"] = quantization
    write_json(folder / OWN, own)


def _quantization(model: nn.Module) -> dict | None:
    """How transformers quantized the base, for merging it as it was."""
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    return quantization.to_dict() if hasattr(quantization, "to_dict") else quantization


def _task_type(model: nn.Module) -> str | None:
    """PEFT's task type: it wraps a model by it, and needs generation methods for the language-model types."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"


def base_model_of(folder: str | Path) -> str:
    """Name of the base model that an adapter folder records.

    Raises:
        UserError: no adapter folder, or none recorded.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        read_folder(Path(folder))  # says what is wrong
    name = read_json(path, "an adapter folder needs it").get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path} records no base model; give --model")
    return name


def load(model: nn.Module, folder: str | Path, trainable: bool = False) -> nn.Module:
    """Attach the adapter in `folder` to a model, in place; ours or PEFT's own (DoRA or LoRA). Returns the model.

    Args:
        trainable: leave A, B and m trainable (to go on training); False for inference.

    Raises:
        UserError: a missing, corrupt or ill-typed file, a field that is not honoured, or tensors that do not fit the model
            (all mismatches in one message). The model is then unchanged.
    """
    config, raw, tensors = read_folder(Path(folder))
    if vars(model).get(RECORD) is not None:
        raise UserError("this model has an adapter already; call doratune.detach(model) before loading another")
    selection, config = resolve(model, config, raw, tensors)
    check(model, config, selection, tensors, str(folder), raw)
    attach_selection(model, config, selection, trainable, loading=True)
    put(model, tensors)
    return model


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Put the tensors of a folder into a model that is attached with the same settings (resuming).

    Raises:
        UserError: as `load`.
    """
    _, raw, tensors = read_folder(Path(folder))
    record = record_of(model)
    ranks = {name: layer.adaptation.rank for name, layer in adapters(model)}
    check(model, record.config, Selection(ranks, {}, {}, record.also_train), tensors, str(folder), raw)
    put(model, tensors)


def read_folder(folder: Path) -> tuple[AdapterConfig, dict, dict[tuple[str, str], Tensor]]:
    """(config, PEFT's raw fields, {(module, parameter): tensor}) of an adapter folder, nothing checked against a model."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected an adapter folder with {CONFIG}")
    inner = f"; did you mean {folder / 'adapter'}?" if (folder / "adapter" / CONFIG).is_file() else ""
    raw = read_json(folder / CONFIG, f"an adapter folder needs it{inner}")
    config = peft.from_peft(raw, str(folder / CONFIG))
    if (folder / OWN).is_file():
        own = read_json(folder / OWN, "it belongs to the adapter folder").get("adapter", {})
        try:
            config = _agreeing(AdapterConfig.from_dict(own), config, folder, raw["peft_type"] == peft.OWN_TYPE)
        except TypeError as error:
            raise UserError(f"{folder / OWN}: {error}") from None
    if not (folder / TENSORS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder}/adapter_model.bin is a pickle, which is never loaded; save it as safetensors with PEFT")
    tensors = {parse_key(key): t for key, t in read_tensors(folder / TENSORS).items()}
    return config, raw, tensors


def _agreeing(own: AdapterConfig, theirs: AdapterConfig, folder: Path, ours: bool) -> AdapterConfig:
    """doratune.json, if adapter_config.json (ours: of our type) says the same; PEFT or a hand may have changed the latter since."""
    written = peft.as_written(own)
    compared = ["method", "rank", "also_train"]
    compared += [] if theirs.direction == "vera" else ["alpha", "rank_scaling"]
    compared += ["magnitude_axis", "embedding_magnitude"] if ours else []
    for name in compared:
        if getattr(written, name) != getattr(theirs, name):
            raise UserError(
                f"{folder}: {OWN} says {name} {getattr(written, name)!r}, {CONFIG} says {getattr(theirs, name)!r}; delete {OWN} if "
                f"{CONFIG} is right"
            )
    return own


def _present(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """Without list entries that name nothing here: PEFT writes some by rule (`classifier` and `score`), and asks for one hit."""
    names = [name for name, _ in named_layers(model)]
    kept = {}
    for setting in ("targets", "exclude", "also_train"):
        pattern = getattr(config, setting)
        if isinstance(pattern, tuple):
            kept[setting] = tuple(e for e in pattern if any(name_matches((e,), name) for name in names))
        elif setting == "exclude" and not any(name_matches(pattern, name) for name in names):
            kept[setting] = ()
    if not kept.get("targets", True) and not config.magnitude_only:
        del kept["targets"]  # nothing left: let the selection say what is near
    return replace(config, **kept)


def resolve(model, config: AdapterConfig, raw: dict, tensors) -> tuple[Selection, AdapterConfig]:
    """Which modules of the model the folder speaks of, with their ranks and alphas."""
    config = _present(config, model)
    selection = select(model, config, loading=True)
    ranks, alphas = dict(selection.ranks), dict(selection.alphas)
    if raw.get("layers_to_transform") is not None:
        present = {name for name, _ in tensors if name}
        ranks = {name: rank for name, rank in ranks.items() if name in present}
        config = replace(config, targets=tuple(ranks))
    if raw.get("peft_type") != peft.OWN_TYPE:  # PEFT's names select modules, never batched expert weights
        ranks = {name: rank for name, rank in ranks.items() if "Experts" not in kind_of(layer_at(model, name)).name}
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
        base, direction = kind.base(module), direction_for(config, rank, None)
        wanted = expected(kind, base, module, direction, rank, config.has_magnitude, kind.axis(config))
        shapes |= {(name, parameter): shape for parameter, shape in wanted.items()}
    for name in selection.also_train:
        for key, t in modules[name].state_dict().items():
            shapes["", f"{name}.{key}"] = tuple(t.shape)
    return shapes


def check(model, config: AdapterConfig, selection: Selection, tensors, where: str, raw: dict) -> None:
    """Every tensor the model needs is there, fits, and none is left over: all mismatches in one message."""
    shapes = needed(model, config, selection)
    shared = [("", name) for name in SHARED] if config.direction == "vera" else []
    problems = [f"{_shown(k)} is missing" for k in shapes if k not in tensors]
    problems += [f"{_shown(k)} fits nothing in the model" for k in tensors if k not in shapes and k not in shared]
    for key, shape in shapes.items():
        if key in tensors and fitted(tensors[key], shape).shape != torch.Size(shape):
            problems.append(f"{_shown(key)} has shape {tuple(tensors[key].shape)}, the model needs {shape}")
    if raw.get("peft_type") == peft.PEFT_TYPE:
        problems += peft.bent_convolutions({name: layer_at(model, name) for name in selection.ranks})
    if problems:
        raise UserError(f"{where} does not fit this model: " + listed(problems, 12))


def _shown(key: tuple[str, str]) -> str:
    return ".".join(part for part in key if part)


@torch.no_grad()
def put(model: nn.Module, tensors: dict[Key, Tensor]) -> None:
    """Copy checked tensors into an attached model."""
    record = record_of(model)
    for name, module in adapters(model):
        put_layer(name, module, tensors, shared_pair(tensors))
    for name in record.also_train:
        for key, t in model.get_submodule(name).state_dict(keep_vars=True).items():
            t.detach().copy_(tensors["", f"{name}.{key}"])


def shared_pair(tensors: dict[Key, Tensor]) -> tuple[Tensor, Tensor] | None:
    """VeRA's frozen A (R, max I) and B (max O, R), where the file has them."""
    return tuple(tensors["", name] for name in SHARED) if all(("", name) in tensors for name in SHARED) else None


@torch.no_grad()
def put_layer(name: str, module: nn.Module, tensors: dict[Key, Tensor], shared=None) -> None:
    """Copy one layer's checked tensors into its parameters; shared: VeRA's frozen pair, where the file has it."""
    a = module.adaptation
    shapes = expected(a.kind, a.base, module, a.direction, a.rank, a.magnitude, a.axis)
    found = {parameter: fitted(tensors[name, parameter], shape) for parameter, shape in shapes.items()}
    own = own_parameters(module)
    for parameter, t in of_file(a.kind, a.direction, found, a.rank).items():
        own[parameter].copy_(t)
    if a.relative:
        m, m0 = found["magnitude"].to(own["magnitude_start"]), own["magnitude_start"]
        own["magnitude_delta"].copy_(torch.where((m > 0) & (m0 > 0), m / m0, 1.0).log())
    elif a.magnitude:
        own["magnitude"].copy_(found["magnitude"])
    if shared is not None and a.direction.name == "vera":
        a.direction.shared.give(*shared)
    a.changed()
