"""Several processes of one launch (torchrun, accelerate launch, mpirun): who is first, and what all of them agree on.

The launcher says in the environment how many processes there are; accelerate connects them. Where it does not, each would train on
all of the data and write into the same folder: refused. The first process looks at folders and writes, the others hear from it.
"""

from __future__ import annotations

import atexit
import gc
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch

from ..errors import UserError

T = TypeVar("T")

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


class SaidByFirst(UserError):
    """What the first process found and says; the others end with it, silently."""


def launched() -> tuple[str, int]:
    """(variable that says so, number of processes) by the environment; 1 where no launcher says anything."""
    sizes = {name: _number(os.environ.get(name), 1) for name in SIZES}
    name = max(sizes, key=lambda name: sizes[name])
    return name, max(1, sizes[name])


def rank() -> int:
    """This process's number; 0 is the first."""
    return max([_number(os.environ.get(name), 0) for name in RANKS])


def is_first() -> bool:
    return rank() == 0 or launched()[1] == 1


def refuse_several(command: str) -> None:
    """Raise UserError for a command that is one process, where the environment says that there are several."""
    name, count = launched()
    if count > 1:
        raise UserError(f"{command} runs in one process, but {name} is {count}; start it without a launcher, or unset {name}")


def connect(timeout: float = 1800, device: str = "auto") -> None:
    """Connect the launcher's processes, if there are several; timeout: seconds to wait for the others, now and later.

    Args:
        device: cpu keeps them off the GPUs.

    Raises:
        UserError: they cannot be connected, or not all of them.
    """
    if launched()[1] == 1:
        return
    from accelerate import PartialState

    cpu = device == "cpu" or not torch.cuda.is_available()
    try:
        state = PartialState(cpu=cpu, timeout=timedelta(seconds=timeout), **_store_of_this_round(timeout))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        place = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ)
        raise UserError(
            f"{' is '.join(map(str, launched()))}, but the processes cannot be connected: process {rank()} did not reach the others"
            f" at {place or 'no address'} within {timeout:g} s ({reason}); start all of them, where they reach it, or raise timeout"
        ) from None
    refuse_strangers(state.num_processes)


def _store_of_this_round(timeout: float) -> dict:
    """Where these processes tell one another their addresses, as arguments of `init_process_group`.

    torchrun keeps one store for all its rounds: processes that it starts again would read the addresses of those that died. Each
    round gets a part of the store of its own.
    """
    from torch import distributed

    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    host, port, count = environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), launched()[1]
    store = distributed.TCPStore(host, port, count, is_master=False, timeout=timedelta(seconds=timeout))
    prefix = f"round {environment.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    return {"store": distributed.PrefixStore(prefix, store), "rank": rank(), "world_size": count}


def refuse_strangers(connected: int) -> None:
    """Raise UserError where fewer processes are connected than the environment says."""
    name, count = launched()
    if count > 1 and connected != count:
        raise UserError(
            f"{name} is {count}, but {connected} of these processes {'is' if connected == 1 else 'are'} connected, and each would "
            f"train on all of the data and write the same folder; start them with torchrun, or unset {name} to run one"
        )


def agree(decide: Callable[[], T]) -> T:
    """What the first process decides, in all of them.

    Raises:
        Exception: what it raised; in the others as SaidByFirst.
    """
    if not _connected():
        return decide()
    from torch import distributed

    outcome: list = [None, None]
    if distributed.get_rank() == 0:
        try:
            outcome = [decide(), None]
        except Exception as error:  # the others would wait for ever
            outcome = [None, str(error)]
            distributed.broadcast_object_list(outcome)
            raise
    distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise SaidByFirst(outcome[1])
    return outcome[0]


def wait() -> None:
    """Wait until all processes are here."""
    if _connected():
        torch.distributed.barrier()


def part_at_exit() -> None:
    """Take the processes' group apart when this one ends, while the interpreter still lives.

    PyTorch leaves that to its caller. Gloo's threads hold tensors, whose end needs the interpreter: a late one kills a process that
    has done its work (SIGABRT, "terminate called without an active exception"; 3 of 12 small runs). They end with the last object
    that holds the group, a trainer's too; where shards keep it in PyTorch's caches, they get a moment to let go. To be called where
    all processes have come to the same place: taking apart waits for what is still being sent.
    """
    if _connected():
        atexit.register(_part)


def _part() -> None:
    if _connected():
        torch.distributed.destroy_process_group()
        gc.collect()
        time.sleep(0.1)


def largest(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers, in all of them: one number sent."""
    if not _connected():
        return number
    shared = torch.tensor(number, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)


def average(number: torch.Tensor) -> float:
    """The mean of all processes' numbers, in all of them."""
    number = number.detach().float().clone()
    if _connected():
        torch.distributed.all_reduce(number)
        number /= torch.distributed.get_world_size()
    return float(number)


def _connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _number(text: str | None, default: int) -> int:
    try:
        return int(text or default)
    except ValueError:
        return default
