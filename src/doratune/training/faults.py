"""What happens to runs: gradients that are not finite, and processes that a launcher starts again.

A step whose gradients hold NaN or infinity is not taken: after it the parameters would hold them, too, in every process. Under a
gradient scaler (fp16) such steps are its own to skip, and are not seen here. torchrun (`--max-restarts`) starts all processes anew
when one has died: they go on from the last whole checkpoint of this run, or begin again where it has none.
Cost: one norm of each gradient and one read a step.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from ..errors import UserError, listed
from ..support.processes import launched
from .checkpoints import last_checkpoint
from .folder import METRICS, RECIPE
from .recipe import TrainRecipe
from .resume import check_same
from .sharded import finite

RESTARTS = "TORCHELASTIC_RESTART_COUNT"


class NonFiniteGradient(UserError):
    """A gradient is NaN or infinite; the parameters are as they were before the step."""


def refuse_spoiled_steps(trainer) -> None:
    """Let the trainer's optimizer look at the gradients before each step."""
    names = {p: name for name, p in trainer.model.named_parameters()}

    def look(optimizer, args, kwargs) -> None:
        if getattr(optimizer, "found_inf", None) is not None:  # a fused optimizer, which skips such a step for the scaler
            return
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if finite(p.grad for p in trained):
            return
        spoiled = [names.get(p, "a parameter") for p in trained if not finite([p.grad.detach()])]
        where = f" of {listed(spoiled, 3)}" if spoiled else ""
        among = f", in {launched()[1]} processes" if launched()[1] > 1 else ""
        raise NonFiniteGradient(
            f"the gradient{where} is NaN or infinite at step {trainer.state.global_step + 1}{among}; the step was not taken: lower "
            "the learning rate or look at the data, then --resume from the last checkpoint"
        )

    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's wrapper has none of its hooks
    if isinstance(optimizer, torch.optim.Optimizer) and not getattr(optimizer, "looks_at_gradients", False):
        optimizer.register_step_pre_hook(look)
        optimizer.looks_at_gradients = True


def restarted(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe as these processes have to follow it: started again by torchrun, they resume what they had begun."""
    if not int(os.environ.get(RESTARTS) or 0):
        return recipe
    output = Path(recipe.output)
    if not _is_this_run(recipe, output):
        return recipe
    if last_checkpoint(output) is not None:
        return dataclasses.replace(recipe, resume=True, overwrite=False)
    finished = (output / METRICS).exists()
    return recipe if finished else dataclasses.replace(recipe, resume=False, overwrite=True)


def _is_this_run(recipe: TrainRecipe, output: Path) -> bool:
    """Does the folder hold what a run with these very settings has begun?"""
    if not (output / RECIPE).is_file():
        return False
    try:
        check_same(recipe, output / RECIPE)
    except UserError:
        return False
    return True
