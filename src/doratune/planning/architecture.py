"""The model of a configuration without its weights, ready to be traced: quantized, adapted and trained as a recipe says.

A config.json alone will do: of a folder, of the hub, a file by itself, or one of the shapes of `doratune bench`. Modules are made
on the meta device, what is adapted is selected there by the same rules as for training, and the parameters become fake tensors,
which know shapes and dtypes and hold no numbers. Cost: seconds, and no memory.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import baselines
from ..adapter import whole
from ..adapter.targets import select
from ..baselines.config import METHODS as BASELINES
from ..bases import accumulation_dtype
from ..bench.shapes import SHAPES
from ..config import METHODS, AdapterConfig
from ..directions import Direction, direction_for
from ..errors import UserError, listed
from ..layers import kind_of
from ..layers.kind import LayerKind
from ..layers.layouts import named_layers
from ..support.models import WHEEL_MODEL, model_path, quiet_loading, readable_errors, source_settings, torch_dtype
from ..training.objectives import DEFAULT
from ..training.recipe import TrainRecipe
from .stand_ins import Adapter, PackedLinear, Shared

COUNTED = (nn.Linear, Conv1D, PackedLinear)
"""Classes of layers whose adapted calls have a stand-in."""


def config_of(name: str, trust_remote_code: bool = False):
    """The config of a model; weights are not asked for.

    Raises:
        UserError: there is none, or transformers does not know its architecture.
    """
    from transformers import AutoConfig, LlamaConfig

    if name in SHAPES:
        return LlamaConfig(**SHAPES[name], tie_word_embeddings=False)
    path = Path(name)
    if name.lower() != WHEEL_MODEL and path.exists():
        folder = path if path.is_dir() else path.parent
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} has no config.json; give the folder of a transformers model, or its config.json")
        settings = {"trust_remote_code": trust_remote_code}
    else:
        found = model_path(name)
        folder, settings = found, source_settings(found, trust_remote_code)
    with quiet_loading(), readable_errors(name):
        return AutoConfig.from_pretrained(str(folder), **settings)


@dataclass
class Architecture:
    """A model without memory and what a recipe makes of it."""

    recipe: TrainRecipe
    model: nn.Module
    """On the meta device, in the recipe's dtype."""
    adapters: dict[str, dict] = field(default_factory=dict)
    """Adapted layer → what its adapter's stand-in is made from."""
    common: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of tensors that the adapters of all layers share."""
    also_train: tuple[str, ...] = ()
    uncounted: dict[str, str] = field(default_factory=dict)
    """Term → what of it cannot be computed."""

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def full(self) -> bool:
        return self.recipe.method == "full"


def refuse_others(recipe: TrainRecipe) -> None:
    """Raise UserError for a recipe of no language model, before its model is looked for."""
    if recipe.objective != DEFAULT:
        raise UserError(
            f"objective is {recipe.objective}, and doratune plan counts what language models keep; try a few steps instead"
        )


def architecture_of(recipe: TrainRecipe, config=None) -> Architecture:
    """The modules that a recipe trains.

    Raises:
        UserError: no such model, or the recipe's targets or ranks do not fit it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    refuse_others(recipe)
    config = copy.deepcopy(config) if config is not None else config_of(recipe.model, recipe.trust_remote_code)
    if type(config) in AutoModelForImageTextToText._model_mapping and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"{recipe.model} reads images and text, and memory is planned for models of text; plan its language model instead, "
            "with the tokens of an image in max_length"
        )
    config._name_or_path = ""  # files of the weights are not looked at
    dtype = torch.float32 if recipe.method == "full" else torch_dtype(recipe.dtype)
    with quiet_loading(), readable_errors(recipe.model), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    built = Architecture(recipe, model)
    if recipe.method in METHODS:
        config, modules = recipe.adapter(), dict(named_layers(model))
        selection = select(model, config)
        built.also_train = selection.also_train
        shapes = [kind_of(modules[n]).base(modules[n]).shape(modules[n])[-2:] for n in selection.ranks]
        for name, rank in selection.ranks.items():
            direction = direction_for(config, rank, shapes)
            built.adapters[name] = _spec(kind_of(modules[name]), modules[name], rank, config, direction)
            built.common = [tuple(t.shape) for t in direction.shared_tensors().values()]
        if other := {kind_of(modules[name]).name for name in selection.ranks if not isinstance(modules[name], COUNTED)}:
            built.uncounted["activations"] = f"what adapted layers of the kind {listed(sorted(other))} keep"
    return built


def traced_model(built: Architecture, model: nn.Module) -> nn.Module:
    """The model with fake parameters, adapted, in place; model: a copy of the one without memory. Inside the mode of the trace."""
    recipe = built.recipe
    ties = model.all_tied_weights_keys if hasattr(model, "all_tied_weights_keys") else {}
    model.to_empty(device="cpu")
    if ties or getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        model.tie_weights()
    if built.full:
        return model.requires_grad_(True).train()
    model.requires_grad_(False)
    if recipe.quantize != "none":
        _store(model, recipe)
    if recipe.method in BASELINES:
        baselines.attach(model, recipe.baseline())
        return model.train()
    modules = dict(named_layers(model))
    for name, spec in built.adapters.items():
        _adapt(model, modules.get(name), spec)
    for number, shape in enumerate(built.common):
        model.register_buffer(f"common_{number}", torch.empty(shape, dtype=torch.float32))
    whole.train_whole(modules, built.also_train, True)
    for name in built.also_train:
        model.get_submodule(name).requires_grad_(True)
    return model.train()


def _store(model: nn.Module, recipe: TrainRecipe) -> None:
    """Pack every linear layer but the output head, as transformers does for bitsandbytes."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, PackedLinear(module, recipe.quantize, recipe.double_quantization))


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
        "keeps_product": direction.constant_A() and axis == "output",
        "shape": (rows, columns),
        "width": direction.width((rows, columns), rank) if rank else 0,
        "axis": axis,
        "dropout": config.dropout,
        "wide": accumulation_dtype(low),
        "low": low,
    }


def _adapt(model: nn.Module, module: nn.Module | None, spec: dict) -> None:
    """Give a layer the stand-in of its adapter."""
    adapter = Adapter(**spec)
    if not isinstance(module, COUNTED):
        model.register_module(f"adapter_{len(model._modules)}", adapter)
        return
    module.adapter = adapter
    module.own_product = type(module).forward is nn.Linear.forward and spec["width"] > 0
    module.__class__ = type(f"StandIn{type(module).__name__}", (Shared, type(module)), {})


def stored_bytes(built: Architecture) -> tuple[int, int, int]:
    """(bytes of the base's weights, bytes of the adapters, numbers that are trained), from shapes alone."""
    recipe, head = built.recipe, built.model.get_output_embeddings()
    weights = sum(t.nbytes for t in (*built.model.parameters(), *built.model.buffers()))
    if recipe.quantize != "none":
        packed = [m for m in built.model.modules() if isinstance(m, nn.Linear) and m is not head]
        with torch.device("meta"):
            stored = [PackedLinear(m, recipe.quantize, recipe.double_quantization) for m in packed]
        weights += sum(t.nbytes for layer in stored for t in layer.buffers()) - sum(m.weight.nbytes for m in packed)
    if built.full:
        return weights, 0, sum(p.numel() for p in built.model.parameters())
    numbers = sum(math.prod(size) for spec in built.adapters.values() for size in spec["shapes"].values())
    learn = sum(math.prod(spec["shapes"][name]) for spec in built.adapters.values() for name in spec["trained"])
    whole_numbers = sum(p.numel() for name in built.also_train for p in built.model.get_submodule(name).parameters())
    return weights, 4 * (numbers + whole_numbers), learn + whole_numbers
