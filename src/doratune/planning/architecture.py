"""The model of a configuration without its weights, ready to be traced: quantized, adapted and trained as a recipe says.

The config alone will do (`configs.py`). Modules are made on the meta device, what is adapted is selected there by the same rules
as for training, and the parameters become fake tensors, which know shapes and dtypes and hold no numbers. Cost: seconds, and no
memory.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import baselines
from ..adapter import whole
from ..adapter.targets import select
from ..baselines.config import METHODS as BASELINES
from ..bases import accumulation_dtype
from ..config import METHODS, AdapterConfig
from ..directions import Direction, direction_for
from ..errors import listed
from ..layers import kind_of
from ..layers.kind import LayerKind
from ..layers.layouts import named_layers
from ..training.recipe import TrainRecipe
from ..training.visual import freeze_vision
from .stand_ins import Adapter, PackedLinear, stand_in_of
from .workloads import Workload, read_config, refuse_others, workload_of


@dataclass
class Architecture:
    """A model without memory and what a recipe makes of it."""

    recipe: TrainRecipe
    model: nn.Module
    """On the meta device, in the recipe's dtype."""
    workload: Workload
    adapters: dict[str, dict] = field(default_factory=dict)
    """Adapted layer → what its adapter's stand-in is made from."""
    common: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of tensors that the adapters of all layers share."""
    also_train: tuple[str, ...] = ()
    uncounted: dict[str, str] = field(default_factory=dict)
    """Term → what of it cannot be computed."""

    @property
    def full(self) -> bool:
        return self.recipe.method == "full"


def architecture_of(recipe: TrainRecipe, config=None) -> Architecture:
    """The modules that a recipe trains.

    Raises:
        UserError: no such model, or the recipe's targets or ranks do not fit it.
    """
    refuse_others(recipe)
    config = copy.deepcopy(config) if config is not None else read_config(recipe)
    workload = workload_of(recipe, config)
    config._name_or_path = ""  # files of the weights are not looked at
    model = workload.skeleton()
    built = Architecture(recipe, model, workload)
    if recipe.method in METHODS:
        config, modules = workload.adapter(model), dict(named_layers(model))
        selection = select(model, config)
        built.also_train = selection.also_train
        shapes = [kind_of(modules[n]).base(modules[n]).shape(modules[n])[-2:] for n in selection.ranks]
        for name, rank in selection.ranks.items():
            direction = direction_for(config, rank, shapes)
            built.adapters[name] = _spec(kind_of(modules[name]), modules[name], rank, config, direction)
            built.common = [tuple(t.shape) for t in direction.shared_tensors().values()]
        others = {kind_of(modules[name]).name for name in selection.ranks if stand_in_of(modules[name]) is None}
        if others:
            built.uncounted["activations"] = f"what adapted layers of the kind {listed(sorted(others))} keep"
    return built


def traced_model(built: Architecture, model: nn.Module) -> nn.Module:
    """The model with fake parameters, adapted, in place; model: a copy of the one without memory. Inside the mode of the trace."""
    recipe = built.recipe
    model.to_empty(device="cpu")
    for t in (*model.buffers(), *model.parameters()):
        if not t.is_floating_point() and not t.is_complex():
            t.zero_()  # indices: of what `to_empty` leaves, they would be any number
    _tie(model)
    if built.full:
        model.requires_grad_(True)
        freeze_vision(model, recipe.visual())
        return model.train()
    model.requires_grad_(False)
    if recipe.quantize != "none":
        for name in packed_layers(built):
            parent, _, own = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                own,
                PackedLinear(model.get_submodule(name), recipe.quantize, recipe.double_quantization),
            )
    if recipe.method in BASELINES:
        baselines.attach(model, recipe.baseline())
        return model.train()
    modules = dict(named_layers(model))
    common = _common(model, built)
    for name, spec in built.adapters.items():
        _adapt(model, modules.get(name), spec, common)
    whole.train_whole(modules, built.also_train, True)
    for name in built.also_train:
        model.get_submodule(name).requires_grad_(True)
    return model.train()


def _tie(model: nn.Module) -> None:
    """Make one of weights that are tied."""
    config = getattr(model, "config", None)
    said = config is not None and getattr(config.get_text_config(), "tie_word_embeddings", False)
    if said or getattr(model, "all_tied_weights_keys", None):
        model.tie_weights()


def packed_layers(built: Architecture) -> list[str]:
    """Names of the linear layers that a quantized base stores packed."""
    dense = built.workload.dense(built.model)
    return [
        name
        for name, module in built.model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == part or name.startswith(f"{part}.") for part in dense)
    ]


def _spec(kind: LayerKind, plain: nn.Module, rank: int, config: AdapterConfig, direction: Direction) -> dict:
    """What the stand-in of a layer's adapter is made from, but for the settings of all layers."""
    base = kind.base(plain)
    (*stack, rows, columns), low = base.shape(plain), base.dtype(plain)
    shapes = {key: (*stack, *size) for key, size in direction.shapes((rows, columns), rank).items()}
    axis = kind.axis(config) if config.has_magnitude else None
    if axis:
        shapes["magnitude"] = (*stack, rows if axis == "output" else columns)
    return {
        "shapes": shapes,
        "trained": set(shapes) - set(direction.frozen),
        "learns_A": bool(rank) and direction.needs(tuple(declared.trained for declared in direction.tensors))[0],
        "keeps_product": direction.constant_A() and axis == "output" and config.norm_memory > 0,
        "shape": (rows, columns),
        "width": direction.width((rows, columns), rank) if rank else 0,
        "axis": axis,
        "dropout": config.dropout,
        "wide": accumulation_dtype(low),
        "low": low,
    }


def _common(model: nn.Module, built: Architecture) -> dict[torch.dtype, torch.Tensor]:
    """What all layers share, in float32 and in each dtype that layers compute in; {dtype: A (R, I)}."""
    shared_A = {}
    for dtype in {torch.float32, *(spec["low"] for spec in built.adapters.values())} if built.common else ():
        for number, shape in enumerate(built.common):
            tensor = torch.empty(shape, dtype=dtype)
            model.register_buffer(f"common_{number}_{dtype}".replace(".", "_"), tensor)
            shared_A.setdefault(dtype, tensor)
    return shared_A


def _adapt(model: nn.Module, module: nn.Module | None, spec: dict, common: dict[torch.dtype, torch.Tensor]) -> None:
    """Give a layer the stand-in of its adapter."""
    adapter, shared = Adapter(**spec, shared_A=common.get(spec["low"])), stand_in_of(module)
    if shared is None:
        model.register_module(f"adapter_{len(model._modules)}", adapter)
        return
    module.adapter = adapter
    module.own_product = type(module).forward is nn.Linear.forward and spec["width"] > 0
    module.__class__ = type(f"StandIn{type(module).__name__}", (shared, type(module)), {})


def stored_bytes(built: Architecture) -> tuple[int, int, int]:
    """(bytes of the base's weights, bytes of the adapters, numbers that are trained), from shapes alone."""
    recipe = built.recipe
    weights = built.workload.bytes_beside() + sum(t.nbytes for t in (*built.model.parameters(), *built.model.buffers()))
    if recipe.quantize != "none":
        packed = [built.model.get_submodule(name) for name in packed_layers(built)]
        with torch.device("meta"):
            stored = [PackedLinear(m, recipe.quantize, recipe.double_quantization) for m in packed]
        weights += sum(t.nbytes for layer in stored for t in layer.buffers()) - sum(m.weight.nbytes for m in packed)
    if built.full:
        frozen = copy.deepcopy(built.model).requires_grad_(True)
        freeze_vision(frozen, recipe.visual())
        return weights, 0, sum(p.numel() for p in frozen.parameters() if p.requires_grad)
    numbers = sum(math.prod(size) for spec in built.adapters.values() for size in spec["shapes"].values())
    learn = sum(math.prod(spec["shapes"][name]) for spec in built.adapters.values() for name in spec["trained"])
    whole_numbers = sum(p.numel() for name in built.also_train for p in built.model.get_submodule(name).parameters())
    return weights, 4 * (numbers + whole_numbers), learn + whole_numbers
