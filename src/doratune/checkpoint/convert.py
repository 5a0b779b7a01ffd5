"""`doratune convert`: an adapter of any format into any other, exact or refused; written whole or not at all.

    PEFT's or our folder, or a file of `formats/` → module → factors, scaling, magnitude → the other format's names and shapes

Nothing is approximated: what the target cannot say is refused with the reason. A model is needed only where a format leaves names
with underscores, the order of heads, or widths to it; its modules are then built without memory.
Cost: the adapter's tensors, once or twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..directions import direction_of
from ..errors import UserError, listed, near_misses
from ..formats import Stated, format_named, format_names
from ..formats.factors import shaped
from ..formats.names import ModelNames
from ..formats.neutral import NeutralAdapter, NeutralLayer
from ..support.files import open_tensors, read_json, write_json, write_tensors
from ..support.folders import foreign_file, new_folder, refuse_existing
from ..support.model_folders import meta_model
from ..support.outputs import refuse_inputs
from . import peft
from .adapter import CONFIG, OWN, TENSORS, read_folder
from .base_check import header, recorded
from .foreign import as_folder, read_neutral
from .merge import base_folder
from .tensors import file_key

FOLDERS = ("peft", "doratune")
"""Targets that are adapter folders of this package: PEFT's type, or ours, which says more."""
VERSION = "doratune_version"
"""In doratune.json, and in the header of other programs' files that were written here."""


@dataclass(frozen=True)
class Converted:
    """What was done."""

    source_format: str
    target_format: str
    output: str
    modules: int
    tensors: int
    left_behind: tuple[str, ...]
    """Settings that change no output and that the target does not record."""


def targets() -> tuple[str, ...]:
    return (*FOLDERS, *format_names())


def convert(
    adapter: str | Path,
    to: str,
    output: str | Path,
    *,
    model: str | nn.Module | None = None,
    component: str | None = None,
    magnitude_axis: str | None = None,
    alpha: float | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write the adapter in another format.

    Args:
        adapter: a folder or a file; to: one of `targets()`.
        output: a folder, or a name that ends in .safetensors where the format is one file.
        model: its folder, hub id, or the model itself (only names and shapes are asked).
        component: unet, transformer, text_encoder …, of a pipeline's files.
        magnitude_axis, alpha: where the file leaves them open.

    Raises:
        UserError: the source cannot be read, the target cannot say it, or `output` exists.
    """
    if to not in targets():
        raise UserError(f"to is {to!r}; expected one of {', '.join(targets())}{near_misses(to, targets())}")
    source, output = Path(adapter), Path(output)
    base = str(model) if isinstance(model, str | Path) else None
    _refuse_output(output, to, overwrite, {"the adapter": str(source), "the model": base})
    names = model_names(model, component)
    stated = Stated(names, component, magnitude_axis, alpha)
    neutral, source_format = read_neutral(source, stated) or (read_own(source, names), None)
    if source_format is None:
        source_format = "peft" if read_json(source / CONFIG, "").get("peft_type") != peft.OWN_TYPE else "doratune"
    write = _write_folder if to in FOLDERS else _write_foreign
    count = write(neutral, to, output, stated, overwrite, recorded(source))
    return Converted(source_format, to, str(output), len(neutral.layers), count, tuple(neutral.left_behind))


def model_names(model: str | nn.Module | None, component: str | None) -> ModelNames | None:
    """Names and shapes of a model: the model itself, its folder (a pipeline's with `component`), or its name."""
    if model is None or isinstance(model, nn.Module):
        return None if model is None else ModelNames.of(model)
    path = Path(model)
    if (path / "model_index.json").is_file():
        parts = sorted(p.parent.name for p in path.glob("*/config.json"))
        if component not in parts:
            raise UserError(f"{model} is a pipeline; say which part with component: {', '.join(parts)}")
        path = path / component
    elif not (path / "config.json").is_file():
        path = base_folder(str(model))
    return ModelNames.of(meta_model(path))


def read_own(folder: Path, names: ModelNames | None) -> NeutralAdapter:
    """An adapter folder, PEFT's or ours, without a format.

    Raises:
        UserError: as `doratune.load`; a direction whose factors belong to one attachment.
    """
    config, raw, tensors = read_folder(folder)
    direction = direction_of(config.method)
    modules: dict[str, dict[str, Tensor]] = {}
    for (name, parameter), t in tensors.items():
        if name:
            modules.setdefault(name, {})[parameter] = t
    written, alpha_of = peft.as_written(config), peft.PatternValues(raw, "alpha_pattern")
    layers = {}
    for name, parts in modules.items():
        m = parts.pop("magnitude", None)
        layer = NeutralLayer(parts, 1.0, None if m is None else m.reshape(-1), _axis(config, parts))
        if direction.scaled:
            layer = replace(layer, scaling=written.scaling(layer.rank, alpha_of.of(name, written.alpha)))
        layers[name] = layer
    if not layers:
        raise UserError(f"{folder} holds no adapted module")
    if experts := [name for name, parts in modules.items() if _stacked(parts)]:
        raise UserError(f"{listed(experts, 3)}: batched experts, for which only adapter folders of ours have a place")
    others = {key: t for (name, key), t in tensors.items() if not name}
    shared = {key: t for key, t in others.items() if key in direction.shared_names}
    base = raw.get("base_model_name_or_path")
    return NeutralAdapter(
        layers,
        whole={key: t for key, t in others.items() if key not in shared},
        also_train=config.also_train,
        base_model=base if isinstance(base, str) else None,
        dropout=config.dropout,
        shared=shared,
        left_behind=_training_settings(config),
    )


def _stacked(parts: dict[str, Tensor]) -> bool:
    """Has each expert its own B (E, O, R)? The filters of a convolution in one dimension are (O, R, 1)."""
    A, B = parts.get("lora_A"), parts.get("lora_B")
    return B is not None and B.dim() == 3 and (B.shape[2] != 1 or B.shape[1] != len(A))


def _axis(config, parts: dict[str, Tensor]) -> str:
    if "embedding_A" in parts:
        return "input" if config.embedding_magnitude == "dimension" else "output"
    return config.magnitude_axis


def _training_settings(config) -> list[str]:
    """What matters to going on with training and to no output."""
    defaults = {"norm_gradient": "detached", "magnitude_form": "direct", "magnitude_from": "base", "start": "zero"}
    return [f"{name}={getattr(config, name)!r}" for name, usual in defaults.items() if getattr(config, name) != usual]


def _refuse_output(output: Path, to: str, overwrite: bool, inputs: dict[str, str | None]) -> None:
    refuse_inputs(output, inputs)
    if output.suffix == ".safetensors":
        if to in FOLDERS or format_named(to).in_folder:
            raise UserError(
                f"output is {output}, and {to} is a folder: its settings lie in a file of their own; give a folder's name"
            )
        if output.exists() and not overwrite:
            raise UserError(f"{output} exists; give another name or pass --overwrite")
        if output.exists() and not _is_own(output):
            raise foreign_file(output.parent, output.name)
    else:
        refuse_existing(output, overwrite)


def _is_own(path: Path) -> bool:
    """Did this command write the file?"""
    try:
        with open_tensors(path) as file:
            return VERSION in (file.metadata() or {})
    except UserError:
        return False


def _write_foreign(neutral: NeutralAdapter, to: str, output: Path, stated: Stated, overwrite: bool, norms: dict) -> int:
    one = format_named(to)
    if neutral.shared:
        raise UserError(f"method is {neutral.method!r}, whose layers share factors: {to} has no place for these")
    if problem := one.cannot_say(neutral, stated):
        raise UserError(f"{to} cannot say this adapter: {problem}")
    written = one.write(neutral, stated)
    tensors = _apart({key: _saved(t) for key, t in written.tensors.items()})
    metadata = written.metadata | {VERSION: __version__} | header(norms)
    if output.suffix == ".safetensors":
        write_tensors(output, tensors, metadata)
        return len(tensors)
    with new_folder(output, overwrite) as temporary:
        write_tensors(temporary / one.file, tensors, metadata)
        if written.settings:
            write_json(temporary / CONFIG, written.settings)
    return len(tensors)


def _write_folder(neutral: NeutralAdapter, to: str, output: Path, stated: Stated, overwrite: bool, norms: dict) -> int:
    """An adapter folder: PEFT's type where PEFT has words for it, ours else."""
    neutral = replace(neutral, layers={name: _framed(one) for name, one in shaped(neutral.layers, stated.model).items()})
    config, described, tensors = as_folder(neutral)
    if direction_of(config.method).shared_names and not neutral.shared:
        raise UserError(
            f"method is {config.method!r} and the file lacks the factors that its layers share; save them with it first"
        )
    if to == "peft":
        if problem := _not_in_peft(neutral, stated.model):
            raise UserError(f"PEFT's format cannot say this adapter: {problem}; convert to doratune instead")
        described = peft.describe(config, neutral.ranks(), neutral.alphas(), neutral.base_model)
    direction = direction_of(config.method)
    named = _apart({file_key(key, direction): _saved(t) for key, t in tensors.items()})
    with new_folder(output, overwrite) as temporary:
        write_tensors(temporary / TENSORS, named, header(norms))
        write_json(temporary / CONFIG, described)
        if to == "doratune":
            write_json(temporary / OWN, {VERSION: __version__, "adapter": config.to_dict()})
    return len(named)


def _framed(layer: NeutralLayer) -> NeutralLayer:
    """With the magnitude of a convolution as PEFT has it, (1, O, 1…)."""
    A = layer.factors.get("lora_A")
    if (
        layer.magnitude is None
        or layer.axis == "input"
        or A is None
        or A.dim() < 3
        or len(layer.factors["lora_B"]) != layer.magnitude.numel()
    ):
        return layer
    return replace(layer, magnitude=layer.magnitude.reshape(1, -1, *[1] * (A.dim() - 2)))


def _not_in_peft(neutral: NeutralAdapter, names: ModelNames | None) -> str | None:
    """Why PEFT's format has no words for this adapter, or None."""
    if neutral.method not in ("lora", "dora", "vera"):
        return f"method is {neutral.method!r}, which PEFT has not"
    for name, layer in neutral.layers.items():
        if layer.magnitude is not None and layer.embedding and layer.axis == "output":
            return f"{name} has a magnitude per token, and PEFT's embeddings have one per dimension"
        if layer.magnitude is not None and not layer.embedding and layer.axis == "input":
            return f"{name} has one magnitude per input column, and PEFT has one per output row"
        if names is not None and names.groups.get(name, 1) > 1:
            return f"{name} is a convolution in {names.groups[name]} groups, for which PEFT's filters cannot be merged"
    return None


def _saved(t: Tensor) -> Tensor:
    return t.detach().float() if t.is_floating_point() and t.dtype != torch.float64 else t.detach()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """No two of them in one memory, which safetensors refuses."""
    seen: set[int] = set()
    apart = {}
    for key, t in tensors.items():
        apart[key] = t.clone() if t.numel() and t.untyped_storage().data_ptr() in seen else t
        seen.add(t.untyped_storage().data_ptr())
    return apart
