"""`save` and `load`: an adapter folder = adapter_config.json + adapter_model.safetensors (PEFT's layout) + doratune.json.

doratune.json holds the whole AdapterConfig (training settings that PEFT's file cannot say: norm gradient, seed, magnitude-only
modules); a folder without it is PEFT's own. Everything is checked against the model before the model is touched.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..adapter.attach import BASELINE, adapters, attach_selection, record_of
from ..adapter.base_norms import known
from ..adapter.elsewhere import refuse_synchronized
from ..adapter.foreign import refuse_foreign
from ..adapter.fresh import unsaved
from ..adapter.layer import refuse_altered
from ..adapter.several import room_for
from ..adapter.states import Model, base_name
from ..adapter.targets import Selection
from ..config import AdapterConfig
from ..directions import direction_of
from ..errors import UserError, kind_in_words, listed
from ..formats import recognized
from ..formats.names import COMPONENTS
from ..layers.fsdp import reshard
from ..layers.layouts import layer_at, named_layers
from ..layers.shares import at_hand, first, gathered, sharded
from ..layers.wrappers import module_at, plain_state, unwrapped
from ..math.autograd import no_autocast
from ..support.files import open_tensors, read_json, read_tensors, write_json, write_tensors
from ..support.folders import generation, recover, steady
from ..support.model_folders import class_record
from ..support.processes import agree
from . import peft
from .base_check import KEY, OTHER, base_norms, refuse_apart, refuse_other_base
from .base_check import recorded as recorded_norms
from .base_weights import base_tensors, put_in, split, take_out
from .fitting import check, fit, put, put_starts
from .foreign import read_foreign
from .names import plain_names
from .own_file import agreeing
from .tensors import Key, file_key, parse_keys, to_file
from .values import STARTS, read_starts

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", peft.OWN_FILE
FINGERPRINT = "doratune_fingerprint"
FORMATS = ("auto", "peft", "doratune")


def save(model: nn.Module, folder: str | Path, format: str = "auto") -> None:
    """Write the adapter of an attached or merged model; A, B, m in fp32. The folder then holds this adapter, or, should the process
    be killed, the one that it held; what else lies in it stays. Of a model in shards every process calls this; the first writes.

    Args:
        format: "peft" loads in PEFT; "doratune" is the same layout under our own type; "auto" takes "peft" where
            PEFT's format can say it all.

    Raises:
        UserError: nothing attached, or format "peft" for an adapter that PEFT's format cannot say (with the reason).
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    record, folder, model = record_of(model), Path(folder), unwrapped(model)
    refuse_foreign(model, "doratune.save")
    record.registry.find_shares(model)
    layers = dict(adapters(model))
    refuse_altered([(name, layer, layer.adapted) for name, layer in layers.items() if record.merged is None], "saved")
    config = record.config
    modules = {name: layer_at(model, name) for name in layers}
    problem = peft.cannot_say(config, {name: (layer.adapted.kind, modules[name]) for name, layer in layers.items()})
    whole = peft.modules_to_save(config.also_train, record.also_train, [name for name, _ in named_layers(model) if name])
    if whole is None and problem is None:
        problem = f"PEFT would train more modules whole than {listed(record.also_train, 3)}: it goes by the end of a name"
    if format == "peft" and problem:
        raise UserError(f'{problem}; save with format="doratune"')
    ranks = {name: layer.adapted.rank for name, layer in layers.items()}
    base = base_name(model)
    transposed = all(layer.adapted.kind.transposed and not layer.adapted.kind.stacked for layer in layers.values())
    own_type = format == "doratune" or problem is not None
    described = peft.describe(config, ranks, record.alphas, base, transposed, own_type, None if own_type else whole)
    tensors: dict[Key, Tensor] = {}
    writes = first(model)
    for name, layer in layers.items():
        with at_hand(modules[name], layer.adapted.names), no_autocast(layer.adapted.base.device(modules[name])):
            exported = to_file(layer, modules[name], config.scaling(1, record.alphas[name]))
        tensors |= {(name, parameter): t for parameter, t in exported.items()} if writes else {}
    for direction in {id(layer.adapted.direction): layer.adapted.direction for layer in layers.values()}.values():
        tensors |= {("", name): t.clone() for name, t in direction.shared_tensors().items()}
    tensors |= {("", key): t for key, t in base_tensors(model, record).items()}
    for name in record.also_train:
        state = {f"{name}.{key}": t for key, t in plain_state(module_at(model, name)).items()}
        state |= {key: t for key, t in record.wide.items() if key in state}
        for key, t in state.items():
            tensors |= {("", key): value.detach().clone()} if (value := gathered(t)) is not None and writes else {}
    described |= {"task_type": _task_type(model)}
    own = {"doratune_version": __version__, "adapter": config.to_dict()}
    if trained_class := class_record(model):
        own["model"] = trained_class
    if any(not layer.adapted.base.writable for layer in layers.values()) and (quantization := _quantization(model)):
        own["quantization"] = quantization
    own[KEY] = base_norms(layers, modules, merged=record.merged is not None)
    files = {TENSORS: {file_key(key, direction_of(config.method)): t for key, t in tensors.items()}}
    if config.magnitude_form == "relative":
        starts = {name: _start(layer, modules[name]) for name, layer in layers.items()}
        files[STARTS] = {f"{name}.magnitude_start": m0.detach().clone() for name, m0 in starts.items()}
    agree(lambda: _write(folder, described, own, files)) if sharded(model) else _write(folder, described, own, files)


def _start(layer, module: nn.Module) -> Tensor:
    """m₀ of a relative magnitude."""
    with at_hand(module, ("magnitude_start",)):
        return gathered(layer.magnitude_start)


def _write(folder: Path, described: dict, own: dict, files: dict[str, dict[str, Tensor]]) -> None:
    """One generation of an adapter folder; a fingerprint of all that it says binds the files to one another."""
    fingerprint = _fingerprint(described, own, files)
    with generation(folder, lambda name: name not in (CONFIG, TENSORS, OWN, STARTS), key=CONFIG) as stage:
        for name, tensors in files.items():
            write_tensors(stage / name, tensors, {FINGERPRINT: fingerprint})
        write_json(stage / CONFIG, described)
        write_json(stage / OWN, own | {"fingerprint": fingerprint})


def _fingerprint(described: dict, own: dict, files: dict[str, dict[str, Tensor]]) -> str:
    """Digest of settings and tensors: the same adapter has the same one, wherever it is saved."""
    digest = hashlib.blake2b(json.dumps([described, own], sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensors in files.items():
        for key, t in sorted(tensors.items()):
            digest.update(f"{name} {key} {t.dtype} {tuple(t.shape)}".encode())
            digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _refuse_mixed(folder: Path, fingerprint) -> None:
    """Raise UserError where files of two saves lie in one folder; files without a fingerprint are PEFT's, or older."""
    for name in (TENSORS, STARTS):
        if (folder / name).is_file() and fingerprint is not None:
            with open_tensors(folder / name) as file:
                other = (file.metadata() or {}).get(FINGERPRINT)
            if other is not None and other != fingerprint:
                raise UserError(f"{folder}: {name} and {OWN} are of two different saves; copy or save the adapter again, whole")


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
        if recognized(Path(folder)) is not None:
            raise UserError(f"{folder} records no base model; give --model")
        read_folder(Path(folder))  # says what is wrong
    name = read_json(path, "an adapter folder needs it").get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path} records no base model; give --model")
    return name


def load(
    model: Model,
    folder: str | Path,
    trainable: bool = False,
    *,
    name: str = "default",
    magnitude_axis: str | None = None,
    alpha: float | None = None,
    check_base: bool = True,
) -> Model:
    """Attach the adapter in `folder` to a model, in place; ours, PEFT's own (DoRA or LoRA), or a file or folder of another program
    (`formats/`: kohya, LyCORIS, diffusers, torchtune, mlx-lm, ai-toolkit, the authors'). Returns the model.

    Args:
        trainable: leave A, B and m trainable (to go on training); False for inference.
        name: of the adapter, where the model gets several (`doratune.use`); the one in use is set aside.
        magnitude_axis: output or input, where another program's file leaves it open; alpha: likewise.
        check_base: refuse a base with other row norms than the adapter was trained on (`base_check.py`); False where the base was
            changed on purpose.

    Raises:
        UserError: a missing, corrupt or ill-typed file, a field that is not honoured, tensors that do not fit the model
            (all mismatches in one message), or another base. The model is then unchanged.
    """
    config, raw, tensors = read_folder(Path(folder), unwrapped(model), magnitude_axis, alpha)
    plain = unwrapped(model)
    if BASELINE in vars(plain):
        raise UserError("this model has an adapter already, a baseline's; load the base model again")
    refuse_foreign(plain, "doratune.load")
    refuse_synchronized(model, trainable)
    with room_for(plain, name):
        read = fit(plain, Path(folder), config, raw, tensors)
        originals = put_in(plain, read.base, read.selection.ranks)
        try:
            if check_base:
                refuse_other_base(plain, folder, raw.get("base_model_name_or_path"))
            attach_selection(plain, read.config, read.selection, trainable, loading=True)
        except BaseException:
            take_out(plain, originals)
            raise
        record = record_of(plain)
        record.replaced |= originals
        record.base = tuple(path for path in originals if path in read.base)
        record.name = name
        put(plain, read.tensors)
        put_starts(plain, read.starts)
    if lost := unsaved(plain, record.also_train):
        shown = [f"{name} ({reason})" for name, reason in lost.items()]
        warnings.warn(f"{folder} does not hold {listed(shown, 4)}, which no file holds: they are random here", stacklevel=2)
    return model


def load_weights(model: nn.Module, folder: str | Path, check_base: bool = True) -> None:
    """Put the tensors of a folder into a model that is attached with the same settings (resuming); check_base: as `load`.

    Raises:
        UserError: as `load`.
    """
    record, model, where = record_of(model), unwrapped(model), str(folder)
    reshard(model)
    config, raw, tensors = read_folder(Path(folder))
    _, raw, tensors = plain_names(model, config, raw, tensors, where)
    layers = dict(adapters(model))
    selection = Selection({name: layer.adapted.rank for name, layer in layers.items()}, {}, {}, record.also_train)
    base, tensors = split(model, layers, record.also_train, tensors)
    starts = read_starts(Path(folder), layers, record.config)
    check(model, record.config, selection, tensors, where, raw, base, starts)
    if check_base:
        norms = {name: known(layer.adapted.base_norms) for name, layer in layers.items()}
        refuse_apart(recorded_norms(folder), norms.get, OTHER.format(where))
    put(model, tensors)
    put_starts(model, starts)


def read_folder(
    folder: Path, model: nn.Module | None = None, magnitude_axis: str | None = None, alpha: float | None = None
) -> tuple[AdapterConfig, dict, dict[tuple[str, str], Tensor]]:
    """(config, PEFT's raw fields, {(module, parameter): tensor}) of an adapter folder, nothing checked against a model; of another
    program's file too, whose names of modules, axis or alpha may have to be taken from the model or be said."""
    recover(folder)
    if (foreign := read_foreign(folder, model, magnitude_axis, alpha)) is not None:
        return foreign
    return steady(folder, lambda: _read(folder))


def _read(folder: Path) -> tuple[AdapterConfig, dict, dict[tuple[str, str], Tensor]]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected an adapter folder with {CONFIG}")
    if (folder / "baseline_config.json").is_file():
        raise UserError(f"{folder} holds a baseline (series, parallel or prefix), no adapter; it can be trained and evaluated only")
    part = next((name for name in ("adapter", *COMPONENTS) if (folder / name / CONFIG).is_file()), None)
    inner = f"; did you mean {folder / part}?" if part else ""
    raw = read_json(folder / CONFIG, f"an adapter folder needs it{inner}")
    config = peft.from_peft(raw, str(folder / CONFIG))
    if (folder / OWN).is_file():
        own = read_json(folder / OWN, "it belongs to the adapter folder")
        _refuse_mixed(folder, own.get("fingerprint"))
        adapter = own.get("adapter", {})
        if not isinstance(adapter, dict):
            raise UserError(
                f"{folder / OWN} has {kind_in_words(adapter)} under 'adapter', expected an object; save the adapter again"
            )
        try:
            settings = AdapterConfig.from_dict(adapter)
        except UserError as error:
            raise UserError(f"{folder / OWN}: {error}") from None
        config = agreeing(settings, config, folder, raw["peft_type"] == peft.OWN_TYPE)
        raw = raw | {OWN: adapter}
    if not (folder / TENSORS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder}/adapter_model.bin is a pickle, which is never loaded; save it as safetensors with PEFT")
    tensors = parse_keys(read_tensors(folder / TENSORS), direction_of(config.method), str(folder / TENSORS))
    return config, raw, tensors
