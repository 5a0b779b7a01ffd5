"""Attach an adapter to a model in place, walk over it, and take it off again.

Cost of attaching: one pass over the adapted weights for w² (m starts there), and R·(I + O) + O numbers a layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..bases import accumulation_dtype
from ..config import AdapterConfig
from ..directions import direction_for
from ..directions.vera import SharedFactors
from ..errors import UserError, listed
from ..layers import fastpath, kind_of
from ..layers.adapted import MAGNITUDE_NAMES, NEVER_TRAINED, Adapted, adapted_class, become, own_parameters
from ..layers.layouts import named_layers
from ..layers.site import Adaptation
from ..layers.together import Siblings
from . import start as initial
from . import whole
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
    merged: dict | None = None
    wide: dict[str, nn.Parameter] = field(default_factory=dict)  # of the modules that are trained whole, while merged


def attach(model: nn.Module, config: AdapterConfig | None = None, *, trainable: bool = True, original=None) -> nn.Module:
    """Adapt a model in place and return it; everything else is frozen.

    Args:
        config: what to adapt and how; the defaults are DoRA, rank 16, all linear layers.
        trainable: False freezes the adapter too (inference).
        original: the unquantized weights of a quantized model, for `start="loftq"` and `magnitude_from="original"`: a function
            from a module's name to its weight (O, I), or a model with the same names.

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
        if isinstance(module, Adapted | whole.Whole) or vars(module).get(RECORD) is not None or BASELINE in vars(module):
            raise UserError(f"{name} has an adapter already, attached to a part of this model or a whole it is in; detach it first")
    return attach_selection(model, config, select(model, config), trainable, original)


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
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    replaced = whole.train_whole(modules, selection.also_train, trainable)
    for p in model.parameters():
        p.requires_grad_(False)
    for name in selection.also_train:
        for p in modules[name].parameters():
            p.requires_grad_(trainable and p.is_floating_point())
    shapes = [bases[n].shape(modules[n])[-2:] for n in selection.ranks]
    common = Common(Siblings(), shared_factors(config, shapes), original, loading, config.norm_memory)
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
    try:
        for name, rank in selection.ranks.items():
            adapt(modules[name], name, config, rank, selection.alphas[name], trainable, common)
    except BaseException:
        detach(model)  # as it was
        raise
    whole.cover_readers(model)
    fastpath.close(model)
    return model


@dataclass
class Common:
    """What the layers of one attachment share."""

    siblings: Siblings
    shared: SharedFactors | None
    original: object = None
    loading: bool = False  # the values come from a file afterwards
    norm_memory: int = 0  # bytes left for products that are kept

    def may_keep(self, a: Adaptation, module: nn.Module) -> bool:
        """Is there memory left for this layer's U = W·Aᵀ, where A never changes?"""
        if a.direction.name != "vera" or not a.magnitude or a.axis != "output" or len(a.base.shape(module)) > 2:
            return False
        wanted = a.base.shape(module)[0] * a.rank * a.base.dtype(module).itemsize + 4 * a.rank**2
        if wanted > self.norm_memory:
            return False
        self.norm_memory -= wanted
        return True


def shared_factors(config: AdapterConfig, shapes: list[tuple[int, int]]) -> SharedFactors | None:
    """VeRA's frozen pair, large enough for every layer."""
    if config.direction != "vera" or not shapes:
        return None
    return SharedFactors(config.rank, max(rows for rows, _ in shapes), max(columns for _, columns in shapes), config.seed)


def adapt(
    module: nn.Module, name: str, config: AdapterConfig, rank: int, alpha: float, trainable: bool, common: Common | None = None
) -> None:
    """Adapt one module in place; rank 0 trains the magnitude alone."""
    kind = kind_of(module)
    base = kind.base(module)
    base.trial(module)
    base.adopt(module)
    common = common or Common(Siblings(), shared_factors(config, [base.shape(module)[-2:]]))
    a = kind.adaptation(
        kind=kind,
        base=base,
        direction=direction_for(config, rank, common.shared),
        rank=rank,
        scaling=config.scaling(rank, alpha) if rank else 1.0,
        magnitude=config.has_magnitude,
        axis=kind.axis(config),
        full_gradient=config.norm_gradient == "full",
        relative=config.magnitude_form == "relative",
        dropout=config.dropout,
        siblings=common.siblings,
    )
    a.keep_product = common.may_keep(a, module)
    seed = (config.seed << 32) + zlib.crc32(name.encode())
    module.adaptation = a
    try:
        _create(module, a, config, seed, name, common)
    except BaseException:
        for key in (*a.direction.names, "lora_A", "lora_B", *MAGNITUDE_NAMES):
            module._parameters.pop(key, None)
        base.release(module)
        del module.adaptation
        raise
    for key, p in own_parameters(module).items():
        p.requires_grad_(trainable and key not in NEVER_TRAINED)
    become(module, adapted_class(type(module), a.magnitude and a.relative))
    a.belongs_to(module)
    kind.joined(module)


def _create(module: nn.Module, a: Adaptation, config: AdapterConfig, seed: int, name: str, common: Common) -> None:
    """Register the direction's parameters and the magnitude, with their first values."""
    dtype, device = accumulation_dtype(a.base.dtype(module)), a.base.device(module)
    a.create(module, seed, dtype, device)
    for key in ("lora_A", "lora_B"):
        if key not in module._parameters:
            module.register_parameter(key, None)
    if common.loading:
        first = a.frozen_facts(module).w2.sqrt() if a.magnitude else None
    else:
        first = initial.of_layer(module, a, config, seed, name, common.original)
    if a.magnitude and a.relative:
        module.register_parameter("magnitude_delta", nn.Parameter(torch.zeros_like(first)))
        module.register_parameter("magnitude_start", nn.Parameter(first))
    else:
        module.register_parameter("magnitude", nn.Parameter(first) if a.magnitude else None)


@torch.no_grad()
def detach(model: nn.Module) -> nn.Module:
    """Back to the untouched base model, in place: same modules, same tensors, same `requires_grad`.

    Raises:
        UserError: nothing is attached, or the adapter is merged (unmerge first).
    """
    record = record_of(model)
    if record.merged is not None:
        raise UserError("this model is merged; call doratune.unmerge(model) before doratune.detach(model)")
    for _, module in list(adapters(model)):
        take_off(module)
    fastpath.reopen(model)
    whole.give_back(model, record.replaced)
    for path, buffer in record.buffers.items():
        model.get_buffer(path).copy_(buffer)
    for name, p in model.named_parameters():
        p.requires_grad_(record.requires_grad.get(name, p.requires_grad))
    delattr(model, RECORD)
    return model


def take_off(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Make an adapted module a plain one again; returns its own parameters."""
    names = (*module.adaptation.direction.names, "lora_A", "lora_B", *MAGNITUDE_NAMES)
    own = {name: module._parameters.pop(name) for name in dict.fromkeys(names) if name in module._parameters}
    kind = module.adaptation.kind
    module.adaptation.base.release(module)
    del module.adaptation
    become(module, type(module).plain_class)
    kind.left(module)
    return own


def put_on(module: nn.Module, a: Adaptation, own: dict[str, nn.Parameter | None]) -> None:
    """Undo `take_off`."""
    for name, p in own.items():
        module.register_parameter(name, p)
    module.adaptation = a
    a.base.adopt(module)
    become(module, adapted_class(type(module), a.magnitude and a.relative))
    a.kind.joined(module)


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

    `lora_A` and `lora_B` are None on magnitude-only layers, `magnitude` is None under `lora`. A batched weight of experts has the
    name `<module>.<weight>` and one more dimension in front of each. On a merged model the second item is the stored adapter of
    the layer, with the same attributes.
    """
    record = vars(model).get(RECORD)
    if record is not None and record.merged is not None:
        yield from record.merged.items()
        return
    if lazy := [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]:
        raise UserError(f"{listed(lazy)}: not initialized yet (a lazy module); run the model once before attaching")
    for name, module in named_layers(model):
        if isinstance(module, Adapted):
            yield name, module


def refresh(model: nn.Module) -> None:
    """Declare a hand edit of A, B or W: every norm is computed anew on its next use."""
    for module in model.modules():
        if isinstance(module, Adapted):
            module.adaptation.changed()
