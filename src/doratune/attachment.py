"""Attach an adapter to a model in place, walk over it, and take it off again.

Cost of attaching: one pass over the adapted weights for w² (m starts there), and R·(I + O) + O numbers a layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from .config import AdapterConfig
from .errors import UserError, listed
from .layers import kind_of
from .layers.adapted import Adapted, adapted_class, own_parameters
from .layers.site import Adaptation
from .layers.together import Siblings
from .targets import Selection, select

RECORD = "_doratune"


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
    merged: dict | None = None


def attach(model: nn.Module, config: AdapterConfig | None = None, *, trainable: bool = True) -> nn.Module:
    """Adapt a model in place and return it; everything else is frozen.

    Args:
        config: what to adapt and how; the defaults are DoRA, rank 16, all linear layers.
        trainable: False freezes the adapter too (inference).

    Raises:
        UserError: the model is attached already, or the configuration does not fit it; the model is then unchanged.
    """
    config = config or AdapterConfig()
    if (record := vars(model).get(RECORD)) is not None:
        state = "merged; call doratune.unmerge and doratune.detach" if record.merged is not None else "attached already"
        raise UserError(f"this model is {state}; call doratune.detach(model) before attaching again")
    if lazy := [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]:
        raise UserError(f"{listed(lazy)}: not initialized yet (a lazy module); run the model once before attaching")
    for name, module in model.named_modules():
        if isinstance(module, Adapted) or vars(module).get(RECORD) is not None:
            raise UserError(f"{name} has an adapter already, attached to a part of this model or a whole it is in; detach it first")
    return attach_selection(model, config, select(model, config), trainable)


def attach_selection(model: nn.Module, config: AdapterConfig, selection: Selection, trainable: bool) -> nn.Module:
    """`attach` for modules, ranks and alphas that are resolved already (loading)."""
    modules = dict(model.named_modules())
    if empty := [name for name in selection.ranks if modules[name].weight.is_meta]:
        raise UserError(f"{listed(empty)}: the weight is on the meta device; load the model's weights before attaching")
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    replaced = _train_whole(modules, selection.also_train, trainable)
    for p in model.parameters():
        p.requires_grad_(False)
    for name in selection.also_train:
        for p in modules[name].parameters():
            p.requires_grad_(trainable and p.is_floating_point())
    siblings = Siblings()
    for name, rank in selection.ranks.items():
        adapt(modules[name], name, config, rank, selection.alphas[name], trainable, siblings)
    record = Attachment(
        config=config,
        names=tuple(selection.ranks),
        left_out=selection.left_out,
        also_train=selection.also_train,
        requires_grad=requires_grad,
        alphas=selection.alphas,
        replaced=replaced,
        buffers={f"{n}.{k}": b.clone() for n in selection.also_train for k, b in modules[n].named_buffers()},
    )
    setattr(model, RECORD, record)
    return model


def adapt(
    module: nn.Module, name: str, config: AdapterConfig, rank: int, alpha: float, trainable: bool, siblings: Siblings | None = None
) -> None:
    """Adapt one module in place; rank 0 trains the magnitude alone."""
    a = Adaptation(
        kind=kind_of(module),
        rank=rank,
        scaling=config.scaling(rank, alpha) if rank else 1.0,
        magnitude=config.has_magnitude,
        axis=config.magnitude_axis,
        full_gradient=config.norm_gradient == "full",
        dropout=config.dropout,
        siblings=siblings or Siblings(),
    )
    dtype = torch.float64 if a.base.dtype(module) == torch.float64 else torch.float32
    seed = (config.seed << 32) + zlib.crc32(name.encode())
    module.adaptation = a
    a.direction.create(module, a.base.shape(module), rank, seed, dtype, a.base.device(module))
    m = nn.Parameter(a.frozen_facts(module).w2.sqrt().to(dtype)) if a.magnitude else None
    module.register_parameter("magnitude", m)
    for p in own_parameters(module).values():
        p.requires_grad_(trainable)
    become(module, adapted_class(type(module)))
    a.belongs_to(module)


def become(module: nn.Module, cls: type) -> None:
    """Give a module another class. accelerate's hooks keep the old class's forward on the module: they get the new one."""
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is type(module).forward:
            setattr(module, name, cls.forward.__get__(module))
    module.__class__ = cls


def _train_whole(modules, names, trainable: bool) -> dict[str, nn.Parameter]:
    """Give modules that are trained whole parameters of their own; the originals (perhaps tied elsewhere) are kept."""
    replaced, own = {}, {}
    for name in names:
        for path, p in list(modules[name].named_parameters(remove_duplicate=False)):
            owner, _, leaf = path.rpartition(".")
            if id(p) not in own:  # a tie inside the module stays a tie
                own[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=trainable)
            replaced[f"{name}.{path}"] = p
            modules[name].get_submodule(owner)._parameters[leaf] = own[id(p)]
    return replaced


@torch.no_grad()
def detach(model: nn.Module) -> nn.Module:
    """Back to the untouched base model, in place: same modules, same tensors, same `requires_grad`.

    Raises:
        UserError: nothing is attached, or the adapter is merged (unmerge first).
    """
    record = record_of(model)
    if record.merged is not None:
        raise UserError("this model is merged; call doratune.unmerge(model) before doratune.detach(model)")
    for _, module in adapters(model):
        for name in ("lora_A", "lora_B", "magnitude"):
            module._parameters.pop(name, None)
        del module.adaptation
        become(module, type(module).plain_class)
    for path, p in record.replaced.items():
        owner, _, leaf = path.rpartition(".")
        parameters = model.get_submodule(owner)._parameters
        p.data = p.data.to(parameters[leaf].device, parameters[leaf].dtype)  # where the model moved to meanwhile
        parameters[leaf] = p
    for path, buffer in record.buffers.items():
        model.get_buffer(path).copy_(buffer)
    for name, p in model.named_parameters():
        p.requires_grad_(record.requires_grad.get(name, p.requires_grad))
    delattr(model, RECORD)
    return model


def record_of(model: nn.Module) -> Attachment:
    """The model's attachment.

    Raises:
        UserError: nothing is attached.
    """
    record = getattr(model, "__dict__", {}).get(RECORD)
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

    `lora_A` and `lora_B` are None on magnitude-only layers, `magnitude` is None under `lora`. On a merged model the second
    item is the stored adapter of the layer, with the same attributes.
    """
    record = vars(model).get(RECORD)
    if record is not None and record.merged is not None:
        yield from record.merged.items()
        return
    if lazy := [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]:
        raise UserError(f"{listed(lazy)}: not initialized yet (a lazy module); run the model once before attaching")
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def parameter_groups(model: nn.Module, lr: float = 1e-4, weight_decay: float = 0.01, magnitude_lr_ratio: float = 1.0) -> list[dict]:
    """Parameter groups for any torch optimizer: A and B with decay, m without, at `magnitude_lr_ratio` times the rate.

    One-dimensional parameters of modules that are trained whole (norms, biases) get no decay either.

    Raises:
        UserError: nothing is attached, the adapter is merged, or nothing is trainable.
    """
    if record_of(model).merged is not None:
        raise UserError("this model is merged; call doratune.unmerge(model) before training")
    groups = {"factors": [], "whole": [], "whole_vectors": [], "magnitude": []}
    magnitudes = {id(m.magnitude) for _, m in adapters(model) if m.magnitude is not None}
    factors = {id(p) for _, m in adapters(model) for p in own_parameters(m).values()} - magnitudes
    for p in model.parameters():
        if p.requires_grad:
            whole = "whole" if p.dim() > 1 else "whole_vectors"
            group = "magnitude" if id(p) in magnitudes else "factors" if id(p) in factors else whole
            groups[group].append(p)
    if not any(groups.values()):
        raise UserError("nothing is trainable; the adapter was loaded frozen: use doratune.load(..., trainable=True)")
    settings = {
        "factors": {"lr": lr, "weight_decay": weight_decay},
        "whole": {"lr": lr, "weight_decay": weight_decay},
        "whole_vectors": {"lr": lr, "weight_decay": 0.0},
        "magnitude": {"lr": lr * magnitude_lr_ratio, "weight_decay": 0.0},
    }
    return [{"params": params, "name": name, **settings[name]} for name, params in groups.items() if params]


def refresh(model: nn.Module) -> None:
    """Declare a hand edit of A, B or W: every norm is computed anew on its next use."""
    for module in model.modules():
        if isinstance(module, Adapted):
            module.adaptation.changed()
