"""Attach an adapter to a model in place, walk over it, and take it off again.

Cost of attaching: that of each layer (`layer.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..config import AdapterConfig
from ..errors import UserError, listed
from ..layers import fastpath, kind_of
from ..layers.adapted import Adapted, is_adapted
from ..layers.fsdp import reshard, shares_of
from ..layers.layouts import named_layers
from ..layers.registry import Registry
from ..layers.shares import at_hand
from ..layers.watch import put_hooks, take_hooks
from ..layers.weight import AdaptedWeight
from ..layers.wrappers import module_at, named_buffers, named_modules, named_parameters, unwrapped
from . import guards, whole
from . import start as initial
from .elsewhere import refuse_elsewhere, refuse_synchronized, refuse_unreturnable
from .foreign import refuse_foreign
from .fresh import trained_whole
from .kernels import writing_kernels
from .layer import Common, adapt, follow, put_on, refuse_altered, take_off
from .states import RECORD, Model, Original, has_adapter, let_go, refuse_merged
from .targets import Selection, select

BASELINE = "_doratune_baseline"


@dataclass
class Attachment:
    """What `attach` did to a model, kept on the model as a plain attribute so that copies of the model carry it."""

    config: AdapterConfig
    names: tuple[str, ...]
    left_out: dict[str, str]
    also_train: tuple[str, ...]
    requires_grad: dict[str, bool]
    alphas: dict[str, float]
    replaced: dict[str, nn.Parameter]  # original parameters of the modules that are trained whole
    buffers: dict[str, torch.Tensor]  # copies of their buffers
    registry: Registry
    overwritten: str | None  # the package whose kernels write over layers' outputs
    merged: dict | None = None
    wide: dict[str, nn.Parameter] = field(default_factory=dict)  # of the modules that are trained whole, while merged
    base: tuple[str, ...] = ()  # base weights that came with the adapter's file: their originals are in `replaced`
    fresh: dict[str, str] = field(default_factory=dict)  # modules trained whole because no file holds them → why
    name: str = "default"

    @property
    def for_good(self) -> bool:
        """Is it merged, with no original weight kept?"""
        return bool(self.merged) and all(stored.original is None for stored in self.merged.values())


@dataclass
class SetAside:
    """An adapter that is not in use: what belongs to it alone, with nothing of W's size."""

    record: Attachment
    layers: dict[str, tuple[AdaptedWeight, dict]]
    whole: dict[str, nn.Parameter]  # of the modules that are trained whole, and base weights that came with its file
    buffers: dict[str, torch.Tensor]


def attach(
    model: Model,
    config: AdapterConfig | None = None,
    *,
    trainable: bool = True,
    original: Original | None = None,
    name: str = "default",
) -> Model:
    """Adapt a model in place and return it; everything else is frozen. Of a compiled or otherwise wrapped model, what it stands
    around is adapted.

    Args:
        config: what to adapt and how; the defaults are DoRA, rank 16, all linear layers.
        trainable: False freezes the adapter too (inference).
        name: of the adapter, where the model gets several (`doratune.use`); the one in use is set aside.
        original: the unquantized weights of a quantized model, for `start="loftq"` and `magnitude_from="original"`: a function
            from a module's name to its weight (O, I), or a model with the same names.

    Raises:
        UserError: the model is attached already, or the configuration does not fit it; the model is then unchanged.
    """
    config = config or AdapterConfig()
    from .several import room_for  # which sets aside what is attached here

    plain = unwrapped(model)
    refuse_foreign(plain, "doratune.attach")
    refuse_synchronized(model, trainable)
    with room_for(plain, name):
        _refuse_unready(plain)
        config, fresh = trained_whole(plain, config)
        attach_selection(plain, config, select(plain, config), trainable, original)
        record = record_of(plain)
        record.name, record.fresh = name, fresh
    return model


def _refuse_unready(model: nn.Module) -> None:
    """Modules without weights yet, and adapters in parts of the model."""
    if lazy := [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]:
        raise UserError(f"{listed(lazy)}: not initialized yet (a lazy module); run the model once before attaching")
    for name, module in named_modules(model):
        if isinstance(module, Adapted | whole.Whole) or has_adapter(module) or BASELINE in vars(module):
            raise UserError(f"{name} has an adapter already, attached to a part of this model or a whole it is in; detach it first")


def attach_selection(
    model: nn.Module, config: AdapterConfig, selection: Selection, trainable: bool, original=None, loading: bool = False
) -> nn.Module:
    """`attach` for modules, ranks and alphas that are resolved already; loading: the values come from a file afterwards."""
    modules = dict(named_layers(model))
    bases = {name: kind_of(modules[name]).base(modules[name]) for name in selection.ranks}
    refuse_elsewhere(model, modules, bases, config, selection, trainable)
    if not loading and initial.needs_original(config):
        for name, base in bases.items():
            initial.original_weight(original, name, base.shape(modules[name]), config)
    requires_grad = {name: p.requires_grad for name, p in named_parameters(model)}
    replaced = whole.train_whole(modules, selection.also_train, trainable)
    for p in model.parameters():
        p.requires_grad_(False)
    for name in selection.also_train:
        for p in modules[name].parameters():
            p.requires_grad_(trainable and p.is_floating_point())
    shapes = [bases[n].shape(modules[n])[-2:] for n in selection.ranks]
    overwritten = writing_kernels(model) if config.keep_base_output is None else "keep_base_output" * config.keep_base_output
    common = Common(Registry(), config, shapes, bool(overwritten), original, loading)
    common.shares = shares_of(model)
    record = Attachment(
        config=config,
        names=tuple(selection.ranks),
        left_out=selection.left_out,
        also_train=selection.also_train,
        requires_grad=requires_grad,
        alphas=selection.alphas,
        replaced=replaced,
        buffers={f"{n}.{k}": b.clone() for n in selection.also_train for k, b in named_buffers(modules[n])},
        registry=common.registry,
        overwritten=overwritten or None,
    )
    setattr(model, RECORD, record)
    try:
        for name, rank in selection.ranks.items():
            with at_hand(kind_of(modules[name]).home(modules[name]), names=()):
                adapt(modules[name], name, config, rank, selection.alphas[name], trainable, common)
    except BaseException:
        detach(model)  # as it was
        raise
    whole.cover_readers(model)
    fastpath.close(model)
    put_hooks(model, record.registry, is_adapted)
    guards.put_on(model)
    return model


def detach(model: Model) -> Model:
    """Back to the untouched base model, in place: same modules, same tensors, same `requires_grad`. Of several adapters the one in
    use is taken off; the others stay set aside.

    Raises:
        UserError: nothing is attached, or the adapter is merged (unmerge first). Merged for good, it is forgotten.
    """
    if record_of(model).for_good:
        let_go(unwrapped(model))
    else:
        set_aside(model, "doratune.detach(model)", "detached")
    return model


@torch.no_grad()
def set_aside(model: nn.Module, what: str, done: str = "set aside") -> SetAside:
    """Take the adapter in use off the model, with its own tensors kept; `what` comes after an unmerge, `done` is what is done.

    Raises:
        UserError: nothing is attached, the adapter is merged, or another package changed an adapted layer.
    """
    record, model = record_of(model), unwrapped(model)
    refuse_merged(record, what)
    adapted = list(adapters(model))
    refuse_altered(adapted, done)
    refuse_foreign(model, what.partition("(")[0])
    refuse_unreturnable(model, record.replaced, what.partition("(")[0])
    record.registry.find_shares(model)
    layers = {name: (module.adapted, take_off(module)) for name, module in adapted}
    fastpath.reopen(model)
    take_hooks(model)
    guards.take_off(model)
    trained = {path: _parameter(model, path) for path in record.replaced}
    whole.give_back(model, record.replaced)
    buffers = {path: _buffer(model, path).clone() for path in record.buffers}
    for path, buffer in record.buffers.items():
        _buffer(model, path).copy_(buffer)
    for name, p in named_parameters(model):
        p.requires_grad_(record.requires_grad.get(name, p.requires_grad))
    delattr(model, RECORD)
    return SetAside(record, layers, trained, buffers)


@torch.no_grad()
def put_back(model: nn.Module, aside: SetAside) -> None:
    """Undo `set_aside` on the plain model, where it is now and in the dtype that it has now."""
    reshard(model)
    record, modules = aside.record, dict(named_layers(model))
    record.requires_grad = {name: p.requires_grad for name, p in named_parameters(model)}
    trainable = {path: p.requires_grad for path, p in aside.whole.items()}
    record.buffers = {path: _buffer(model, path).clone() for path in record.buffers}
    record.replaced = {path: _parameter(model, path) for path in record.base}
    record.replaced |= whole.train_whole(modules, record.also_train, trainable=True)
    for p in model.parameters():
        p.requires_grad_(False)
    whole.put_values(model, aside.whole, trainable)
    for name, (weight, own) in aside.layers.items():
        follow(modules[name], weight, own)
        put_on(modules[name], weight, own)
        weight.changed()
    for path, buffer in aside.buffers.items():
        _buffer(model, path).copy_(buffer)
    setattr(model, RECORD, record)
    whole.cover_readers(model)
    fastpath.close(model)
    put_hooks(model, record.registry, is_adapted)
    guards.put_on(model)


def _parameter(model: nn.Module, path: str) -> nn.Parameter:
    owner, _, leaf = path.rpartition(".")
    return module_at(model, owner)._parameters[leaf]


def _buffer(model: nn.Module, path: str) -> torch.Tensor:
    owner, _, leaf = path.rpartition(".")
    return module_at(model, owner)._buffers[leaf]


def record_of(model: nn.Module) -> Attachment:
    """The model's attachment.

    Raises:
        UserError: nothing is attached.
    """
    record = vars(unwrapped(model)).get(RECORD) if isinstance(model, nn.Module) else None
    if record is None and not isinstance(model, nn.Module):
        raise UserError(f"expected a model with an adapter, got {model!r}; load it, call doratune.attach, and pass the model")
    if record is None:
        hint = ""
        if any(isinstance(m, Adapted) for m in model.modules()):
            hint = "; a part of it is: pass the model that was given to doratune.attach"
        raise UserError(f"no adapter is attached to this {type(model).__name__}{hint or '; call doratune.attach first'}")
    return record


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) for every adapted layer; `.lora_A` (R, I), `.lora_B` (O, R), `.magnitude` (O,) or (I,), `.scaling`.

    `lora_A` and `lora_B` are None on magnitude-only layers, `magnitude` is None under `lora`. A batched weight of experts has the
    name `<module>.<weight>` and one more dimension in front of each. On a merged model the second item is the stored adapter of
    the layer, with the same attributes.
    """
    record = vars(unwrapped(model)).get(RECORD)
    if record is not None and record.merged is not None:
        yield from record.merged.items()
        return
    if lazy := [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]:
        raise UserError(f"{listed(lazy)}: not initialized yet (a lazy module); run the model once before attaching")
    for name, module in named_layers(model):
        if isinstance(module, Adapted):
            yield name, module


def refresh(model: nn.Module) -> None:
    """Declare a hand edit of A, B, m or W: everything derived is prepared anew on its next use."""
    for module in model.modules():
        if isinstance(module, Adapted):
            module.adapted.moved()
