"""What cannot be done where a model's weights are in shards, offloaded, or nowhere: one line each, with the way out."""

from __future__ import annotations

from torch import nn

from ..config import AdapterConfig
from ..directions import direction_for
from ..errors import UserError, listed
from ..layers import kind_of
from ..layers.fsdp import TWICE, shares_of
from ..layers.offload import offloaded, on_disk
from ..layers.shares import is_share
from ..layers.tensor_parallel import obstacle
from ..layers.wrappers import module_at, synchronizing
from ..layers.zero3 import in_parts, partition


def refuse_elsewhere(model: nn.Module, modules: dict, bases: dict, config: AdapterConfig, selection, trainable: bool) -> None:
    """Weights that are not whole in the model now, where that is in the way."""
    homes = {name: kind_of(modules[name]).home(modules[name]) for name in bases}
    empty = [name for name, base in bases.items() if base.device(modules[name]).type == "meta"]
    if lost := [name for name in empty if not offloaded(homes[name])]:
        raise UserError(f"{listed(lost)}: the weight is on the meta device; load the model's weights before attaching")
    if empty and (trainable or selection.also_train):
        raise UserError(
            f"{listed(empty)}: accelerate offloads it, and between its calls there is nothing that an optimizer could train; load "
            "the model without offloading, or attach with trainable=False and without also_train"
        )
    if parts := [name for name, home in homes.items() if any(in_parts(p) for p in home._parameters.values())]:
        raise UserError(
            f"{listed(parts)}: DeepSpeed's ZeRO-3 has its weight in parts; load the model without deepspeed.zero.Init, attach, and "
            "then call deepspeed.initialize or accelerator.prepare"
        )
    known = shares_of(model)
    places = {name: (id(home), kind_of(modules[name]).leaf(modules[name])) for name, home in homes.items()}
    if twice := [name for name, place in places.items() if place in known and known[place].twice]:
        raise UserError(f"{listed(twice)}: {TWICE}")
    split = [name for name, home in homes.items() if any(is_share(p) for p in home._parameters.values())]
    parallel = [name for name in split if places[name] not in known]
    if split and (config.start != "zero" or selection.also_train):
        what = f"start {config.start!r} reads" if config.start != "zero" else f"also_train copies {listed(selection.also_train)}:"
        way = "load the model without its tensor-parallel plan" if parallel else "attach first, then call fully_shard"
        raise UserError(f"{what} whole weights, which {listed(split)} has in shards; {way}")
    directions = {name: direction_for(config, selection.ranks[name]) for name in parallel}
    obstacles = {name: obstacle(kind_of(modules[name]), modules[name], directions[name]) for name in parallel}
    for reason in filter(None, obstacles.values()):
        strange = [name for name in parallel if obstacles[name] == reason]
        raise UserError(
            f"{listed(strange)}: its weight is in shards of another engine than fully_shard (tensor parallel), and {reason}; load "
            "the model without them, attach, and shard with fully_shard; or adapt other layers"
        )


def refuse_unreturnable(model: nn.Module, replaced: dict[str, nn.Parameter], what: str) -> None:
    """Modules that are trained whole and in shards: FSDP2 would go on bringing what was trained in their originals' place."""
    owners = {path: path.rpartition(".") for path in replaced}
    split = [path for path, (owner, _, leaf) in owners.items() if is_share(module_at(model, owner)._parameters[leaf])]
    if split:
        raise UserError(f"{listed(split)}: trained whole and in shards, so {what} has no original to put back; load the base again")


def refuse_unwritable(layers: list) -> None:
    """Weights that cannot be written where they lie."""
    for name, module in layers:
        home, base = module.adapted.kind.home(module), module.adapted.base
        if any(partition(p) for p in home._parameters.values()):
            raise UserError(
                f"{name} is in parts of DeepSpeed's ZeRO-3, which merging in place does not follow; take "
                "doratune.merged_state_dict(model), or save the adapter and call doratune merge"
            )
        if not base.writable and any(is_share(p) for p in home._parameters.values()):
            raise UserError(
                f"{name} is quantized and in shards, so it has no place for a merged weight; save the adapter and merge the files"
            )
        if on_disk(home):
            raise UserError(
                f"{name} is offloaded to files, which merging would not change; take doratune.merged_state_dict(model), or "
                "save the adapter and call doratune merge, which goes shard by shard"
            )


def refuse_synchronized(model: nn.Module, trainable: bool) -> None:
    """Raise where new parameters would be trained without being averaged over the processes.

    Raises:
        UserError: the model, or a part of it, is in DistributedDataParallel or FullyShardedDataParallel already.
    """
    if trainable and (wrapper := synchronizing(model)):
        raise UserError(f"{wrapper} averages the gradients of the parameters it was made with; attach first, then wrap the model")
