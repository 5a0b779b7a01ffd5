"""A Trainer whose model is in shards (FSDP2): the engine, and an optimizer's state that any number of processes can go on with.

    engine       transformers' and accelerate's own. On CPUs accelerate takes an FSDP configuration and trains as DDP without a
                 word: here it gets what it gets on GPUs
    optimizer    whole tensors in optimizer.pt, as one process writes it: 2 → 1 → 4 processes, sharded or not

FSDP1 flattens W, A, B and m into one vector and is refused. Cost of a checkpoint: the trained numbers twice, tensor by tensor.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..errors import UserError
from ..layers.shares import gathered, is_share, put_value, sharded

FSDP = {"shard": False, "offload": True}
"""Values of `fsdp` in a recipe → are shards kept on the CPU?"""


def arguments(fsdp: str) -> dict:
    """TrainingArguments for a recipe's `fsdp`."""
    if fsdp == "none":
        return {}
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True, "cpu_ram_efficient_loading": False}
    return {"fsdp": True, "fsdp_config": {"version": 2, "cpu_offload": FSDP[fsdp], "state_dict_type": "FULL_STATE_DICT"} | wrap}


def wanted(fsdp: str) -> bool:
    """Is a model of several processes to be in shards, by its recipe or by accelerate's configuration?"""
    return fsdp != "none" or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def take_engine(trainer, shards: bool) -> None:
    """Make sure that the engine that was asked for is the one that trains.

    Args:
        shards: does this trainer know how to save a model in shards?

    Raises:
        UserError: FSDP1, or FSDP of a trainer that does not.
    """
    if not wanted("shard" if trainer.args.fsdp else "none") or trainer.args.world_size == 1:
        return
    if not shards:
        raise UserError("fsdp is for adapters over a frozen base; train this method with DDP (fsdp: none)")
    if not trainer.is_fsdp_enabled:  # on CPUs
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        state = trainer.accelerator.state
        given = trainer.args.fsdp_plugin_args if trainer.args.fsdp else {}
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**given)
        if state.fsdp_plugin.cpu_offload and hasattr(state.fsdp_plugin.cpu_offload, "pin_memory"):
            state.fsdp_plugin.cpu_offload = type(state.fsdp_plugin.cpu_offload)(pin_memory=False)  # which only accelerators have
        state.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    if sharded(trainer.model):
        trainer.accelerator.state.fsdp_plugin.auto_wrap_policy = None  # accelerate would look for classes that have new names now
    if trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError("fsdp_version is 1, which flattens W, A, B and m into one vector; set fsdp_version: 2 (fully_shard)")


def trained_shares(trainer) -> list[list[Tensor]]:
    """The optimizer's parameters by group, of a model that is in shards before accelerate takes it; empty of others."""
    return [list(group["params"]) for group in trainer.optimizer.param_groups] if sharded(trainer.model) else []


def put_back(trainer, shares: list[list[Tensor]]) -> None:
    """Give the optimizer `trained_shares` again: accelerate tells parameters apart by address, and empty shares have none."""
    if shares:
        for group, parameters in zip(_plain(trainer.optimizer).param_groups, shares, strict=True):
            group["params"] = parameters


def finite(parameters) -> bool:
    """Are all numbers finite, in every process? One pass, one read."""
    parameters = list(parameters)
    local = [p.detach().to_local() if is_share(p) else p.detach() for p in parameters]
    local = [t for t in local if t.numel()]
    largest = torch._foreach_norm(local, float("inf")) if local else []  # NaN stays NaN, and nothing is squared
    own = not largest or bool(torch.stack([t.isfinite().to(largest[0].device) for t in largest]).all())
    if not any(is_share(p) for p in parameters):
        return own
    flag = torch.tensor(float(own), device=parameters[0].device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def save_optimizer(trainer, folder: str) -> bool:
    """Write the state of the optimizer and the scheduler of a model in shards, whole; False: it is not in shards."""
    if not sharded(trainer.model):
        return False
    state = _plain(trainer.optimizer).state_dict()
    writes = trainer.args.should_save
    for index, values in state["state"].items():
        every = {key: gathered(value) if isinstance(value, Tensor) else value for key, value in values.items()}
        state["state"][index] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in every.items()} if writes else {}
    if writes:
        torch.save(state, Path(folder) / OPTIMIZER_NAME)
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)
    return True


def load_optimizer(trainer, folder: str | None) -> bool:
    """Undo `save_optimizer`, also of a state that one process wrote; False: the model is not in shards."""
    if folder is None or not sharded(trainer.model):
        return False
    optimizer = _plain(trainer.optimizer)
    state = torch.load(Path(folder) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        values.update({key: _as(parameters[index], value) for key, value in values.items()})
    optimizer.load_state_dict(state)
    trainer.lr_scheduler.load_state_dict(torch.load(Path(folder) / SCHEDULER_NAME, weights_only=True))
    return True


def _as(p: Tensor, value):
    """A value of the optimizer's state, in shards where its parameter is."""
    if not isinstance(value, Tensor) or value.shape != p.shape or not is_share(p):
        return value
    share = torch.zeros_like(p.detach())
    put_value(share, value)
    return share


def _plain(optimizer):
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
