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
from ..errors import UserError, listed
from ..layers import kind_of
from ..layers.adapted import own_parameters
from ..math.compose import no_autocast
from ..targets import Selection, name_matches, select
from . import peft
from .files import read_json, read_tensors, write_json, write_tensors

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
    record, folder = record_of(model), Path(folder)
    config = record.config
    if format == "auto":
        format = "doratune" if config.has_magnitude and config.magnitude_axis == "input" else "peft"
    ranks = {name: 0 if layer.lora_A is None else len(layer.lora_A) for name, layer in adapters(model)}
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    transposed = all(layer.adaptation.kind.name == "Conv1D" for _, layer in adapters(model))
    describe = peft.to_peft if format == "peft" else peft.to_own
    described = describe(config, ranks, record.alphas, base, transposed) | {"task_type": _task_type(model)}
    tensors = {}
    for name, layer in adapters(model):
        module = model.get_submodule(name)
        with no_autocast(module.weight.device):
            exported = _exported(layer, module, config.scaling(1, record.alphas[name]))
        tensors |= {peft.file_key(name, p): t for p, t in exported.items()}
    whole = model.state_dict(keep_vars=True)
    for name in record.also_train:
        tensors |= {peft.PREFIX + key: t.detach().clone() for key, t in whole.items() if key.startswith(name + ".")}
    write_tensors(folder / TENSORS, tensors)
    write_json(folder / CONFIG, described)
    write_json(folder / OWN, {"doratune_version": __version__, "adapter": config.to_dict()})


@torch.no_grad()
def _exported(layer, module: nn.Module, scaling_of_rank_one: float) -> dict[str, Tensor]:
    """One layer's tensors as PEFT computes with them: rank 1 with B = 0 for magnitude only, and m = |W + s·B·A| on rows
    without direction, where PEFT has no g = 1 of its own. A row that is 0 altogether would be 0/0 in PEFT: its B gets 1e-12."""
    out = {key: p.detach().clone() for key in ("lora_A", "lora_B", "magnitude") if (p := getattr(layer, key)) is not None}
    a, s = layer.adaptation, layer.scaling
    if layer.lora_A is None:
        rows, columns = a.base.shape(module)
        out |= {"lora_A": torch.zeros(1, columns), "lora_B": torch.zeros(rows, 1)}
        out["lora_A"][0, 0], s = 1.0, scaling_of_rank_one
        out = {key: t.to(module.weight.device) for key, t in out.items()}
    frozen = _frozen_rows(layer, module)
    if layer.magnitude is None or a.axis == "input" or not len(frozen):
        return out
    W = torch.cat([tile for _, tile in a.base.row_tiles(module, frozen)]) if layer is module else 0.0
    A, B = out["lora_A"], out["lora_B"]
    nothing = torch.linalg.vector_norm(W + s * B[frozen] @ A, dim=1) < 1e-12
    B[frozen[nothing], 0] += 1e-12 / (abs(s) * torch.linalg.vector_norm(A[0]))
    out["magnitude"][frozen] = torch.linalg.vector_norm(W + s * B[frozen] @ A, dim=1)
    return out


def _task_type(model: nn.Module) -> str | None:
    """PEFT's task type: it wraps a model by it, and needs generation methods for the language-model types."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"


def _frozen_rows(layer, module: nn.Module) -> Tensor:
    """Indices of rows without direction; a merged layer remembers them."""
    if layer is module:
        return layer.adaptation.frozen_facts(module).directionless.nonzero().squeeze(1)
    return layer.frozen.nonzero().squeeze(1)


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
    config, patterns, tensors = read_folder(Path(folder))
    if vars(model).get(RECORD) is not None:
        raise UserError("this model has an adapter already; call doratune.detach(model) before loading another")
    selection, config = resolve(model, config, patterns, tensors)
    check(model, config, selection, tensors, str(folder))
    attach_selection(model, config, selection, trainable)
    put(model, tensors)
    return model


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Put the tensors of a folder into a model that is attached with the same settings (resuming).

    Raises:
        UserError: as `load`.
    """
    _, _, tensors = read_folder(Path(folder))
    record = record_of(model)
    ranks = {name: 0 if m.lora_A is None else len(m.lora_A) for name, m in adapters(model)}
    check(model, record.config, Selection(ranks, {}, {}, record.also_train), tensors, str(folder))
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
            config = _agreeing(AdapterConfig.from_dict(own), config, folder)
        except TypeError as error:
            raise UserError(f"{folder / OWN}: {error}") from None
    if not (folder / TENSORS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder}/adapter_model.bin is a pickle, which is never loaded; save it as safetensors with PEFT")
    tensors = {peft.parse_key(key): t for key, t in read_tensors(folder / TENSORS).items()}
    return config, raw, tensors


def _agreeing(own: AdapterConfig, theirs: AdapterConfig, folder: Path) -> AdapterConfig:
    """doratune.json, if adapter_config.json says the same; PEFT or a hand may have changed the latter since."""
    for name in ("method", "rank", "alpha", "rank_scaling", "magnitude_axis", "also_train"):
        if getattr(own, name) != getattr(theirs, name):
            raise UserError(
                f"{folder}: {OWN} says {name} {getattr(own, name)!r}, {CONFIG} says {getattr(theirs, name)!r}; delete {OWN} if "
                f"{CONFIG} is right"
            )
    return own


def _present(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """Without list entries that name nothing here: PEFT writes some by rule (`classifier` and `score`), and asks for one hit."""
    names = [name for name, _ in model.named_modules()]
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
    selection = select(model, config)
    ranks, alphas = dict(selection.ranks), dict(selection.alphas)
    if raw.get("layers_to_transform") is not None:
        present = {name for name, _ in tensors if name}
        ranks = {name: rank for name, rank in ranks.items() if name in present}
        config = replace(config, targets=tuple(ranks))
    for name in ranks:
        if ranks[name]:
            ranks[name] = int(peft.pattern_value(raw.get("rank_pattern"), name, config.rank))
            alphas[name] = peft.pattern_value(raw.get("alpha_pattern"), name, config.alpha)
    overrides = {n: r for n, r in ranks.items() if r not in (0, config.rank)}
    config = replace(
        config,
        rank_overrides=overrides,
        alpha_overrides={n: alphas[n] for n in ranks if ranks[n] and alphas[n] != config.alpha},
    )
    return Selection(ranks, alphas, selection.left_out, selection.also_train), config


def check(model, config: AdapterConfig, selection: Selection, tensors, where: str) -> None:
    """Every tensor the model needs is there, fits, and none is left over: all mismatches in one message."""
    expected: dict[tuple[str, str], tuple[int, ...]] = {}
    modules = dict(model.named_modules())
    for name, rank in selection.ranks.items():
        rows, columns = kind_of(modules[name]).base.shape(modules[name])
        expected[name, "lora_A"], expected[name, "lora_B"] = (rank or 1, columns), (rows, rank or 1)
        if config.has_magnitude:
            expected[name, "magnitude"] = (rows if config.magnitude_axis == "output" else columns,)
    for name in selection.also_train:
        for key, t in modules[name].state_dict().items():
            expected["", f"{name}.{key}"] = tuple(t.shape)
    problems = [f"{_shown(k)} is missing" for k in expected if k not in tensors]
    problems += [f"{_shown(k)} fits nothing in the model" for k in tensors if k not in expected]
    for key, shape in expected.items():
        if key in tensors and fitted(tensors[key], key[1]).shape != torch.Size(shape):
            problems.append(f"{_shown(key)} has shape {tuple(tensors[key].shape)}, the model needs {shape}")
    if problems:
        raise UserError(f"{where} does not fit this model: " + listed(problems, 12))


def _shown(key: tuple[str, str]) -> str:
    return ".".join(part for part in key if part)


def fitted(t: Tensor, parameter: str) -> Tensor:
    """A magnitude saved as a column (O, 1) is the vector (O,)."""
    return t.squeeze(-1) if parameter == "magnitude" and t.dim() == 2 and t.shape[-1] == 1 else t


@torch.no_grad()
def put(model: nn.Module, tensors: dict[tuple[str, str], Tensor]) -> None:
    """Copy checked tensors into an attached model."""
    record = record_of(model)
    for name, module in adapters(model):
        for key, p in own_parameters(module).items():
            p.copy_(fitted(tensors[name, key], key))
        module.adaptation.changed()
    for name in record.also_train:
        for key, t in model.get_submodule(name).state_dict(keep_vars=True).items():
            t.detach().copy_(tensors["", f"{name}.{key}"])
