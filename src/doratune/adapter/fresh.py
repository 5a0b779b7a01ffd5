"""Parameters of a model that no file holds: drawn at random when it was loaded (a new head), or grown with the vocabulary.

Frozen and unsaved they are lost: the adapter was trained over numbers that nobody has again. Two things tell:

    marks    every parameter that its loader read from a file is marked; among marked ones, one without a mark was drawn at random
             (only in the tree of the model that was loaded: what stands beside it in a module of one's own may come from elsewhere)
    header   the files it came from (`support/headers.py`): a vocabulary with another number of rows there was resized; where no
             mark is left (a deep copy), a parameter that is not there, while nearly all others are, was drawn at random

A part of a model (the language model of one that sees) has a config that says where it came from once; what the whole model's
files hold is judged by those alone. Only what is certain is reported: quantized storages, constants beside other modules (which a
loader sets again), and what transformers itself takes for no loss are left alone. A model that was built from its config alone is
all random, and that is its user's wish. Cost: names, and the header of a file.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from ..layers import kind_of
from ..layers.adapted import Adapted, own_parameters
from ..support.headers import Header, Keys, header_of
from ..support.model_folders import embeddings_of

MARK = "_is_hf_initialized"
MOST = 0.8
"""Share of the parameters that a header must hold before one that it lacks is called new."""


def fresh_parameters(model: nn.Module) -> dict[str, str]:
    """Name (one for each place) → why no file holds it."""
    found: dict[int, str] = {}
    held: set[int] = set()
    for root in model.modules():  # the whole before its parts
        if hasattr(root, "config") and hasattr(root, "init_weights"):  # a model that from_pretrained may have loaded
            header = header_of(root.config)
            new = _of_root(root, header)
            found |= {key: reason for key, reason in new.items() if key not in found and key not in held}
            held |= _held(root, header) if header else set()
    return {name: found[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in found}


def _held(root: nn.Module, header: Header) -> set[int]:
    """id of each parameter that the files hold, with whatever number of rows."""
    files = Keys(root, header.files)
    return {id(p) for name, p in root.named_parameters() if files.find(name)}


def _of_root(root: nn.Module, header: Header | None) -> dict[int, str]:
    """id of a parameter → why, for one model of transformers."""
    adapter = {id(p) for m in root.modules() if isinstance(m, Adapted) for p in own_parameters(m).values()}
    own = {name: p for name, p in root.named_parameters() if _plain(p) and id(p) not in adapter}
    marked = any(getattr(p, MARK, False) for p in own.values())
    found = {}
    if marked:
        new = {name: p for name, p in own.items() if not getattr(p, MARK, False)}
    else:
        new = _absent(root, own, header) if header else {}
    ignored = [re.compile(pattern) for pattern in getattr(root, "_keys_to_ignore_on_load_missing", None) or ()]
    for name, p in new.items():
        container = next(root.get_submodule(name.rpartition(".")[0]).children(), None) is not None
        if not any(pattern.search(name) for pattern in ignored) and not (container and _constant(p)):
            found[id(p)] = "newly initialized"
    if header:
        found |= _resized(root, header)
    return found


def _absent(root: nn.Module, own: dict[str, nn.Parameter], header: Header) -> dict[str, nn.Parameter]:
    """What the files lack, where they hold nearly all the rest under its name."""
    files = Keys(root, header.files)
    keys = {name: files.find(name) for name in own}
    there = {key for key in keys.values() if key}
    if len(there) < MOST * len(own) or files.converts:
        return {}
    left = [torch.Size(header.shape(key)).numel() for key in header.files if key not in there]
    return {name: own[name] for name, key in keys.items() if key is None and own[name].numel() not in left}  # else: renamed?


def _resized(root: nn.Module, header: Header) -> dict[int, str]:
    """Parameters with a row for each entry of the vocabulary, which the files hold with another number of rows."""
    table = getattr(embeddings_of(root), "weight", None)
    if not isinstance(table, nn.Parameter) or table.dim() != 2:
        return {}
    rows, keys, found = len(table), Keys(root, header.files), {}
    for name, p in root.named_parameters():
        if not _plain(p) or p.dim() not in (1, 2) or len(p) != rows:
            continue
        key = keys.find(name)
        shape = header.shape(key) if key else tuple(p.shape)
        if shape[1:] == tuple(p.shape[1:]) and shape[0] != rows:
            found[id(p)] = f"resized from {shape[0]} to {rows} rows"
    return found


def _plain(p: nn.Parameter) -> bool:
    """Dense numbers in memory, not a quantized storage."""
    return type(p) is nn.Parameter and type(p.data) is Tensor and p.is_floating_point() and p.dtype.itemsize > 1 and not p.is_meta


def _constant(p: nn.Parameter) -> bool:
    return p.numel() == 0 or bool((p.detach() == p.detach().flatten()[0]).all())


def trained_whole(model: nn.Module, config: AdapterConfig) -> tuple[AdapterConfig, dict[str, str]]:
    """The configuration with what no file holds in `also_train`, and what was added: module → why."""
    fresh = fresh_parameters(model) if config.newly_initialized == "train" else {}
    owners: dict[str, str] = {}
    for name, reason in fresh.items():
        owner = name.rpartition(".")[0]
        if owner and _trainable(model.get_submodule(owner)):
            owners.setdefault(owner, reason)
    owners = {n: reason for n, reason in owners.items() if not any(n.startswith(f"{other}.") for other in owners)}
    return replace(config, also_train=tuple(dict.fromkeys((*config.also_train, *owners)))) if owners else config, owners


def _trainable(module: nn.Module) -> bool:
    """Is no storage in it quantized?"""
    kinds = ((kind_of(inner), inner) for inner in module.modules())
    bases = [kind.base(inner) for kind, inner in kinds if kind is not None]
    return all(base is not None and base.writable for base in bases)


def unsaved(model: nn.Module, also_train) -> dict[str, str]:
    """What no file holds and no adapter folder of this configuration will: parameter → why."""
    covered = tuple(f"{name}." for name in also_train)
    return {name: reason for name, reason in fresh_parameters(model).items() if not name.startswith(covered)}
