"""Module names in an adapter file as the model has them now: what wrappers put into names is taken out where that is unambiguous.

    _orig_mod.layers.0.q_proj, module.layers.0.q_proj, layers.0._checkpoint_wrapped_module.q_proj     →  layers.0.q_proj
    base_model.model.base_model.model.layers.0.q_proj                                                 →  layers.0.q_proj

A name that the model has is left alone; another is changed only to one that it has. Two keys that become one are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor, nn

from ..adapter.targets import name_matches
from ..config import AdapterConfig
from ..errors import UserError, listed
from ..layers.layouts import named_layers
from ..layers.wrappers import SEGMENTS
from .tensors import PREFIX, Key, shown

RESERVED = tuple(segment for segment in SEGMENTS if segment.startswith("_"))
"""Segments that nobody gives a module of his own."""

_IN_PATTERN = re.compile(rf"(?:{'|'.join(RESERVED)})\\?\.")


def plain_names(model: nn.Module, config: AdapterConfig, raw: dict, tensors: dict[Key, Tensor], where: str):
    """(config, raw, tensors) of a file under the names of this model.

    Raises:
        UserError: two tensors of the file are one in the model.
    """
    names = {name for name, _ in named_layers(model)}
    renamed: dict[Key, Tensor] = {}
    for key, t in tensors.items():
        new = _of_model(key, names)
        if new in renamed:
            raise UserError(f"{where} holds {shown(new)} twice, once as {shown(key)}; save the adapter again")
        renamed[new] = t

    def entries(values):
        return _entries(values, names) if isinstance(values, list | tuple) else _pattern(values)

    patterns = {name: entries(getattr(config, name)) for name in ("targets", "exclude", "magnitude_only", "also_train")}
    patterns |= {name: _keys(getattr(config, name), entries) for name in ("rank_overrides", "alpha_overrides")}
    fields = {name: entries(raw[name]) for name in ("target_modules", "exclude_modules", "modules_to_save") if raw.get(name)}
    fields |= {name: _keys(raw[name], _pattern) for name in ("rank_pattern", "alpha_pattern") if raw.get(name)}
    return replace(config, **patterns), raw | fields, renamed


def _of_model(key: Key, names: set[str]) -> Key:
    name, parameter = key
    if name:
        return name_in_model(name, names) or name, parameter
    owner, _, leaf = parameter.rpartition(".")
    inner = ".base_layer" if owner.endswith(".base_layer") else ""
    new = name_in_model(owner.removesuffix(".base_layer"), names)
    return key if not new else ("", f"{new}{inner}.{leaf}")


def name_in_model(name: str, names: Iterable[str]) -> str | None:
    """The module of this name: as it is, else without what wrappers and PEFT put into it."""
    return next((candidate for candidate in _spellings(name) if candidate in names), None)


def _spellings(name: str):
    yield name
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
        yield name
    yield (name := ".".join(part for part in name.split(".") if part not in RESERVED))
    while name.startswith("module."):
        name = name.removeprefix("module.")
        yield name
    yield ".".join(part for part in name.split(".") if part not in SEGMENTS)


def _entries(values, names: set[str]):
    """Entries of a list, each as it selects something: PEFT's rule goes by the end of a name."""

    def of_model(entry: str) -> str:
        fitting = (s for s in _spellings(entry) if s and any(name_matches((s,), name) for name in names))
        return next(fitting, entry)

    return type(values)(dict.fromkeys(map(of_model, values)))


def _pattern(pattern: str) -> str:
    return _IN_PATTERN.sub("", pattern) if isinstance(pattern, str) else pattern


def _keys(values: dict, change: Callable) -> dict:
    return {(change([key])[0] if change is not _pattern else _pattern(key)): value for key, value in values.items()}


def both_halves(model: nn.Module, tensors: dict[Key, Tensor]) -> str:
    """What the file holds and what the model has, where the file speaks of modules that the model lacks; else nothing."""
    names = [name for name, _ in named_layers(model) if name]
    held = list(dict.fromkeys(name for name, _ in tensors if name))
    strangers = [name for name in held if name not in names]
    if not strangers:
        return ""
    last = {name.rpartition(".")[2] for name in strangers}
    near = [name for name in names if name.rpartition(".")[2] in last] or names
    return f"; the file is of {listed(strangers, 2)}, the model has {listed(near, 2)}"
