"""Attach an adapter to a model in place, walk over it, and take it off again.

Cost of attaching: that of each layer (`layer.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..config import AdapterConfig
from ..errors import UserError, listed
from ..layers import fastpath, kind_of
from ..layers.adapted import Adapted
from ..layers.layouts import named_layers
from ..layers.registry import Begin, End, Registry
from ..layers.wrappers import module_at, named_buffers, named_modules, named_parameters, synchronizing, unwrapped
from . import guards, whole
from . import start as initial
from .foreign import refuse_foreign
from .layer import Common, adapt, refuse_altered, take_off
from .targets import Selection, select

RECORD, BASELINE = "_doratune", "_doratune_baseline"


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


def attach(model: nn.Module, config: AdapterConfig | None = None, *, trainable: bool = True, original=None) -> nn.Module:
    """Adapt a model in place and return it; everything else is frozen. Of a compiled or otherwise wrapped model, what it stands
    around is adapted.

    Args:
        config: what to adapt and how; the defaults are DoRA, rank 16, all linear layers.
        trainable: False freezes the adapter too (inference).
        original: the unquantized weights of a quantized model, for `start="loftq"` and `magnitude_from="original"`: a function
            from a module's name to its weight (O, I), or a model with the same names.

    Raises:
        UserError: the model is attached already, or the configuration does not fit it; the model is then unchanged.
    """
    config = config or AdapterConfig()
    plain = unwrapped(model)
    refuse_foreign(plain, "doratune.attach")
    refuse_synchronized(model, trainable)
    if (record := vars(plain).get(RECORD)) is not None:
        state = "merged; call doratune.unmerge and doratune.detach" if record.merged is not None else "attached already"
        raise UserError(f"this model is {state}; call doratune.detach(model) before attaching again")
    if lazy := [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]:
        raise UserError(f"{listed(lazy)}: not initialized yet (a lazy module); run the model once before attaching")
    for name, module in named_modules(plain):
        if isinstance(module, Adapted | whole.Whole) or vars(module).get(RECORD) is not None or BASELINE in vars(module):
            raise UserError(f"{name} has an adapter already, attached to a part of this model or a whole it is in; detach it first")
    attach_selection(plain, config, select(plain, config), trainable, original)
    return model


def attach_selection(
    model: nn.Module, config: AdapterConfig, selection: Selection, trainable: bool, original=None, loading: bool = False
) -> nn.Module:
    """`attach` for modules, ranks and alphas that are resolved already; loading: the values come from a file afterwards."""
    modules = dict(named_layers(model))
    bases = {name: kind_of(modules[name]).base(modules[name]) for name in selection.ranks}
    if empty := [name for name, base in bases.items() if base.device(modules[name]).type == "meta"]:
        raise UserError(f"{listed(empty)}: the weight is on the meta device; load the model's weights before attaching")
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
            adapt(modules[name], name, config, rank, selection.alphas[name], trainable, common)
    except BaseException:
        detach(model)  # as it was
        raise
    whole.cover_readers(model)
    fastpath.close(model)
    watch(model)
    guards.put_on(model)
    return model


def refuse_synchronized(model: nn.Module, trainable: bool) -> None:
    """Raise where new parameters would be trained without being averaged over the processes.

    Raises:
        UserError: the model, or a part of it, is in DistributedDataParallel or FullyShardedDataParallel already.
    """
    if trainable and (wrapper := synchronizing(model)):
        raise UserError(f"{wrapper} averages the gradients of the parameters it was made with; attach first, then wrap the model")


def watch(model: nn.Module) -> None:
    """Tell the registry when a forward of the model begins and ends, also where only its body is called (`model.model(…)`)."""
    module, registry = model, record_of(model).registry
    while True:
        module = unwrapped(module)
        if type(module).forward is not nn.Module.forward and not isinstance(module, Adapted):
            module.register_forward_pre_hook(Begin(registry), with_kwargs=True)
            module.register_forward_hook(End(registry), always_call=True)
        holding = [child for child in module.children() if any(isinstance(inner, Adapted) for inner in child.modules())]
        if len(holding) != 1:
            return
        module = holding[0]


def unwatch(model: nn.Module) -> None:
    """Undo `watch`: while merged or detached, forwards cost nothing."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Begin | End)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)


WRITERS = ("liger_kernel", "unsloth")
"""Packages whose rotary embedding rotates q and k in the memory of the projection's output, unseen by version counters."""


def writing_kernels(model: nn.Module) -> str | None:
    """The package among `WRITERS` whose functions this model's modules call, or None. Being imported is not being used."""
    for cls in {type(module) for module in model.modules()}:
        functions = [vars(cls).get("forward"), *vars(sys.modules.get(cls.__module__, cls)).values()]
        for function in functions:
            package = (getattr(function, "__module__", None) or "").partition(".")[0]
            if package in WRITERS and callable(function):
                return package
    return None


@torch.no_grad()
def detach(model: nn.Module) -> nn.Module:
    """Back to the untouched base model, in place: same modules, same tensors, same `requires_grad`.

    Raises:
        UserError: nothing is attached, or the adapter is merged (unmerge first).
    """
    record, plain = record_of(model), unwrapped(model)
    if record.merged is not None:
        raise UserError("this model is merged; call doratune.unmerge(model) before doratune.detach(model)")
    layers = list(adapters(plain))
    refuse_altered(layers, "detached")
    refuse_foreign(plain, "doratune.detach")
    for _, module in layers:
        take_off(module)
    fastpath.reopen(model)
    unwatch(model)
    guards.take_off(model)
    whole.give_back(model, record.replaced)
    for path, buffer in record.buffers.items():
        owner, _, leaf = path.rpartition(".")
        module_at(model, owner)._buffers[leaf].copy_(buffer)
    for name, p in named_parameters(model):
        p.requires_grad_(record.requires_grad.get(name, p.requires_grad))
    delattr(plain, RECORD)
    return model


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
            module.adapted.changed()
