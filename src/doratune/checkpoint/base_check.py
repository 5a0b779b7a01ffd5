"""Is the base under an adapter the one that it was trained on? Its row norms are saved with the adapter (`adapter/base_norms.py`).

    doratune.json                       "base_norms": {module: means}
    the header of a safetensors file    the same, where a conversion writes no doratune.json

An adapter without them (PEFT's, other programs') loads as it is. Cost: some rows of at most 8 modules are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ..adapter.base_norms import RowNorms, known, norms_of, row_norms
from ..adapter.fresh import unsaved
from ..bases.dense import DenseBase
from ..errors import UserError
from ..formats.source import weights_in
from ..layers import kind_of
from ..layers.layouts import layer_at, named_layers
from ..support.files import open_tensors, read_json
from .names import name_in_model
from .peft import OWN_FILE

KEY = "base_norms"
HEADER = "doratune_base_norms"
OTHER = "{} was trained on another base"


def base_norms(layers: dict[str, nn.Module], modules: dict[str, nn.Module], merged: bool) -> dict[str, dict]:
    """What is saved of an attached or merged model: as W is now, where it is a whole plain tensor (it may have been trained or
    edited), else as it was when the adapter was attached."""
    norms = {name: one for name, layer in layers.items() if (one := known(layer.adapted.base_norms)) is not None}
    for name in () if merged else norms:
        base = layers[name].adapted.base
        if base.writable and _is_whole(base, modules[name], norms[name]):
            norms[name] = row_norms(base, modules[name]) or norms[name]
    return {name: one.to_dict() for name, one in norms.items()}


def _is_whole(base, module: nn.Module, before: RowNorms) -> bool:
    """Is W here, and no share of it?"""
    weight = getattr(module, base.kind.weight_name, None)
    whole = type(getattr(weight, "data", None)) is Tensor and weight.dim() > 1
    return whole and base.shape(module)[-1] == before.columns


def recorded(path: str | Path) -> dict[str, RowNorms]:
    """{module: means} of an adapter folder, or of another program's file that was written here; {}: none.

    Raises:
        UserError: a record that says something else.
    """
    path = Path(path)
    own = path / OWN_FILE
    record = read_json(own, "it belongs to the adapter folder").get(KEY) if own.is_file() else None
    file = path if path.is_file() else weights_in(path) if path.is_dir() else None
    if record is None and file is not None and file.suffix == ".safetensors":
        with open_tensors(file) as tensors:
            text = (tensors.metadata() or {}).get(HEADER, "null")
        try:
            record = json.loads(text)
        except ValueError:
            record = text
    if record is None:
        return {}
    if not isinstance(record, dict):
        raise UserError(f"{path}: {KEY} is {record!r:.80}; expected an object of modules")
    try:
        return {name: RowNorms.from_dict(name, values) for name, values in record.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def header(norms: dict[str, RowNorms]) -> dict[str, str]:
    """Metadata of a safetensors file that has no doratune.json beside it."""
    return {HEADER: json.dumps({name: one.to_dict() for name, one in norms.items()})} if norms else {}


def refuse_other_base(model: nn.Module, path: str | Path, base: str | None = None) -> None:
    """Raise where a plain model has other row norms than the base of the adapter at `path`; base: the name that it records. Modules
    that no file holds are drawn anew each time, which `load` says by itself.

    Raises:
        UserError: the module that is furthest apart, both values, and what to do.
    """
    if not (norms := recorded(path)):
        return
    modules = dict(named_layers(model))
    drawn = {parameter.rpartition(".")[0] for parameter in unsaved(model, ())}

    def here(name: str) -> RowNorms | None:
        own = name_in_model(name, modules)
        return None if own is None or own in drawn else norms_of(modules[own])

    refuse_apart(norms, here, OTHER.format(path), base)


def refuse_other_checkpoint(plan, read: Callable[[str], Tensor], path: str | Path) -> None:
    """`refuse_other_base` for a model folder of which a merge is planned; read: the tensor under a key of it."""
    keys = {name: key for key, name in plan.merged.items()} | {name: key for name, key in plan.apart.values()}

    def here(name: str) -> RowNorms | None:
        own = name_in_model(name, keys)
        if own is None:
            return None
        module = layer_at(plan.skeleton, own)
        kind, weight = kind_of(module), plan.base.get(keys[own])
        weight = read(keys[own]) if weight is None else weight
        return stored_norms(kind, weight) if weight.shape == getattr(module, kind.weight_name).shape else None

    refuse_apart(recorded(path), here, OTHER.format(path))


def refuse_apart(norms: dict[str, RowNorms], here: Callable[[str], RowNorms | None], what: str, base: str | None = None) -> None:
    """Raise where recorded row norms are not those that modules have here; `what` begins the message."""
    worst = None
    for name, trained in norms.items():
        if (now := here(name)) is None:
            continue
        apart, there, value = trained.furthest(now)
        tolerance = trained.compared(now)[1]
        if apart > tolerance and (worst is None or apart > worst[0]):
            worst = apart, name, value, there, tolerance
    if worst is not None:
        apart, name, value, there, tolerance = worst
        raise UserError(
            f"{what}: mean row norm of {name} is {value:.6g} here and {there:.6g} there ({100 * apart:.2g} % apart, at most "
            f"{100 * tolerance:.2g} % of rounding); load {base or 'the base that it was trained on'}, or set check_base to false "
            "if the base was changed on purpose"
        )


def stored_norms(kind, weight: Tensor) -> RowNorms | None:
    """The means of a weight as a checkpoint holds it."""

    class Holder:
        pass

    holder = Holder()
    setattr(holder, kind.weight_name, weight)
    return row_norms(DenseBase(kind), holder)
