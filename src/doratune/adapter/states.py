"""What a merged model may do. Merged with its weights kept: unmerge first. Merged for good (`keep="none"`): an ordinary model,
whose weights are the merged ones; it is frozen no more, saved as plain, and may get another adapter.

What stays of an adapter that was merged for good is what `save` writes; attaching, loading and taking off let go of it.
Cost: one walk over the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from ..errors import UserError, listed
from ..layers.layouts import layer_at
from ..layers.wrappers import named_parameters, unwrapped
from . import whole
from .fresh import MARK

Model = TypeVar("Model", bound=nn.Module)
"""What is adapted in place and given back: to a type checker of the class that it was."""
Original = nn.Module | Callable[[str], Tensor]
"""The unquantized weights of a quantized model: a model with the same names, or a function from a name to its weight."""

RECORD, ASIDE = "_doratune", "_doratune_aside"
"""Attributes of a model: the adapter in use; with several: name → `SetAside`, of those that are not in use."""
MERGED = "_doratune_merged"
"""On a model whose weights were merged for good: the name that its base had, which is not its own any more."""


def refuse_merged(record, before: str) -> None:
    """Raise where the adapter of this record is merged; before: what was asked for. None is nobody's record.

    Raises:
        UserError: with what to call.
    """
    if record is None or record.merged is None:
        return
    if record.for_good:
        raise UserError(
            'this model is merged for good (keep="none") and has no adapter any more; call doratune.attach or doratune.load for '
            f"another one before {before}"
        )
    raise UserError(f"this model is merged; call doratune.unmerge(model) before {before}")


def refuse_others_aside(model: nn.Module) -> None:
    """Raise where other adapters would be left over weights that they were not trained over."""
    if others := vars(model).get(ASIDE):
        shown = listed(map(repr, others))
        raise UserError(
            f'keep is "none", and the model has other adapters ({shown}), which would stand over other weights then: '
            "doratune.delete them, or keep the weights"
        )


def settle(model: nn.Module, record) -> None:
    """Make a model that was merged for good an ordinary one: plain classes, `requires_grad` as before attaching, weights that count
    as read."""
    model, loaded = unwrapped(model), any(getattr(p, MARK, False) for p in model.parameters())
    whole.leave(model)
    own = {id(p) for name in record.merged for p in layer_at(model, name).parameters()}
    for name, p in named_parameters(model):
        p.requires_grad_(record.requires_grad.get(name, p.requires_grad) and p.is_floating_point())
        if loaded and (id(p) in own or name in record.replaced):
            setattr(p, MARK, True)
    record.replaced, record.buffers = {}, {}
    setattr(model, MERGED, _name(model))


def has_adapter(module: nn.Module) -> bool:
    """Was this module itself attached, and its adapter not merged for good?"""
    record = vars(module).get(RECORD)
    return record is not None and not record.for_good


def let_go(model: nn.Module) -> None:
    """Forget an adapter that was merged for good."""
    delattr(unwrapped(model), RECORD)


def base_name(model: nn.Module) -> str | None:
    """Where others find the weights that an adapter of this model stands over; None: nowhere."""
    name = _name(model)
    return None if not name or name == vars(model).get(MERGED) else name


def _name(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or ""
