"""Several adapters on one model, by name: one is in use, the others are set aside with their own tensors; all share W.

    names, use, delete        here                       combine, strength    `combine.py`
    disabled, mixed           `routes.py`

Cost: an adapter that is set aside has its A, B and m (and the modules that it trains whole), nothing of W's size. Switching
moves no numbers.
"""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from ..errors import UserError, listed, near_misses
from ..layers.adapted import Adapted, adapted_class
from ..layers.fsdp import reshard
from ..layers.layouts import layer_at
from ..layers.weight import AdaptedWeight
from ..layers.wrappers import unwrapped
from .attach import Attachment, SetAside, adapters, detach, put_back, record_of, set_aside
from .layer import follow
from .states import ASIDE, RECORD, Model


def names(model: nn.Module) -> list[str]:
    """The names of a model's adapters; the one in use, if there is one, comes first."""
    model = unwrapped(model)
    record = vars(model).get(RECORD)
    return [*([] if record is None else [record.name]), *vars(model).get(ASIDE, {})]


def use(model: Model, name: str | None) -> Model:
    """Switch to another adapter of the model; None: to the base, with all adapters set aside. Optimizers keep their parameters.

    Raises:
        UserError: no adapter of this name, or the one in use is merged.
    """
    plain = unwrapped(model)
    record = vars(plain).get(RECORD)
    if (None if record is None else record.name) == name:
        return model
    if name is not None:
        check_known(plain, name)
    aside = dict(vars(plain).get(ASIDE, {}))
    if record is not None and record.for_good:
        detach(plain)
    elif record is not None:
        aside[record.name] = set_aside(plain, "using another adapter")
    if name is not None:
        put_back(plain, aside.pop(name))
    setattr(plain, ASIDE, aside)
    return model


def duplicate(model: nn.Module, name: str) -> None:
    """A frozen copy of the adapter in use under another name, set aside: A, B, m and the modules trained whole, as they are now.

    Raises:
        UserError: nothing is attached, the adapter is merged, or the name is taken.
    """
    record, model = record_of(model), unwrapped(model)
    with room_for(model, name) as aside:
        twin = copy.deepcopy(replace(aside, record=replace(record, name=name, replaced={})))
        for p in (*twin.whole.values(), *(p for _, own in twin.layers.values() for p in own.values() if p is not None)):
            p.requires_grad_(False)
        put_back(model, twin)
    use(model, record.name)


def delete(model: nn.Module, name: str) -> None:
    """Forget an adapter; if it is the one in use, the model is the base afterwards.

    Raises:
        UserError: no adapter of this name, or it is merged.
    """
    model = unwrapped(model)
    check_known(model, name)
    record = vars(model).get(RECORD)
    if record is not None and record.name == name:
        detach(model) if record.for_good else set_aside(model, f"deleting {name!r}")
    else:
        vars(model)[ASIDE] = {other: aside for other, aside in vars(model)[ASIDE].items() if other != name}


def check_known(model: nn.Module, name: str) -> None:
    """Raise for a name that the model has no adapter of."""
    if name not in (known := names(model)):
        have = f"it has {listed(map(repr, known))}" if known else "it has none"
        raise UserError(f"this model has no adapter {name!r}; {have}{near_misses(str(name), known)}")


@contextlib.contextmanager
def room_for(model: nn.Module, name: str) -> Iterator[SetAside | None]:
    """A plain model in the block, for another adapter of this name; the one that was in use is set aside (the block gets it), or in
    use again where the block fails.

    Raises:
        UserError: an adapter of this name is there already, or the one in use is merged.
    """
    reshard(model)
    record, aside = vars(model).get(RECORD), vars(model).get(ASIDE, {})
    merged, record = (record, None) if record is not None and record.for_good else (None, record)  # an ordinary model
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"name is {name!r}; expected a name of letters, digits, _, -, + and .")
    if record is not None and record.merged is not None:
        raise UserError("this model is merged; call doratune.unmerge and doratune.detach before attaching again")
    if record is not None and record.name == name:
        raise UserError(
            f"this model is attached already, with an adapter {name!r}; call doratune.detach(model) before attaching again, or "
            "give another one a name of its own: name='…'"
        )
    if name in aside:
        raise UserError(f"an adapter {name!r} is set aside already; call doratune.use(model, {name!r}), or give another name")
    before = None if record is None else set_aside(model, "attaching another")
    try:
        yield before
    except BaseException:
        if before is not None:
            put_back(model, before)
        if merged is not None:
            setattr(model, RECORD, merged)
        raise
    if before is not None:
        setattr(model, ASIDE, aside | {before.record.name: before})


def record_named(model: nn.Module, name: str) -> Attachment:
    """The attachment of this adapter."""
    record = vars(model).get(RECORD)
    return record if record is not None and record.name == name else vars(model)[ASIDE][name].record


def layers_of(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """{layer: it, adapted with this adapter}: the layer itself if it is in use, else another object over the same W."""
    record = vars(model).get(RECORD)
    if record is not None and record.name == name:
        return dict(adapters(model))
    aside: SetAside = vars(model)[ASIDE][name]
    with placing:
        return {layer: _shadow(layer_at(model, layer), weight, own) for layer, (weight, own) in aside.layers.items()}


placing = threading.RLock()
"""Held by a thread that reads or changes what stands in the place of layers, when it enters or leaves a block."""

_OWN_PLACE = ("adapted", "forward", "_old_forward", "_hf_hook")
"""Attributes of a layer that belong to its place in the model, or to the adapter in use."""


def _shadow(module: nn.Module, weight: AdaptedWeight, own: dict) -> nn.Module:
    """The layer as it is with another adapter: an object of its own over the same tensors, one for all threads at a time."""
    layer = weight.layer
    if layer is not None and vars(layer).get("adapted") is weight:
        return layer
    follow(module, weight, own)
    plain, in_use = module._parameters, ()
    if isinstance(module, Adapted):
        in_use = (*module.adapted.names, "lora_A", "lora_B", "magnitude")
    cls = adapted_class(getattr(type(module), "plain_class", type(module)), weight.magnitude and weight.relative)
    shadow = cls.__new__(cls)
    vars(shadow).update({key: value for key, value in vars(module).items() if key not in _OWN_PLACE})
    shadow._parameters = {key: p for key, p in plain.items() if key not in in_use} | own
    shadow.adapted = weight
    weight.belongs_to(shadow)
    weight.changed()
    return shadow
