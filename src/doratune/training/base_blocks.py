"""Whether each process of a sharded run loads its own part of the base alone, and what it says where it cannot.

What needs whole weights before they are divided is asked of the recipe and of the model on the meta device; all processes come to
the same answer, since they read the same files. Cost: that skeleton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..adapter.targets import select
from ..errors import listed
from ..layers import kind_of
from ..layers.layouts import layer_at
from ..support.shards import blocks_of, obstacle
from .sharded import wanted

if TYPE_CHECKING:
    from torch import nn

    from .objectives import Objective
    from .recipe import TrainRecipe


def base_blocks(recipe: TrainRecipe, objective: Objective, say: Callable[[str], None]) -> dict[str, str] | None:
    """The blocks in which the base is divided while it is loaded; None: each process loads all of it, and a run that divides it
    later says why."""
    if not wanted(recipe.fsdp):
        return None
    skeleton = objective.skeleton()
    if reason := _reason(recipe, objective, skeleton):
        say(whole_base(reason))
        return None
    say("each process loads its own part of the base alone")
    return blocks_of(skeleton)


def whole_base(reason: str) -> str:
    """The line that says that a base which will be in shards is loaded whole."""
    return f"each process holds all of the base until it is divided: {reason}"


def _reason(recipe: TrainRecipe, objective: Objective, skeleton: nn.Module | None) -> str | None:
    if recipe.fsdp == "none":
        return "accelerate's configuration divides it afterwards; fsdp: shard loads it in parts"
    if skeleton is None:
        return f"objective is {recipe.objective!r}, which loads it so"
    if recipe.quantize != "none":
        return f"quantize is {recipe.quantize!r}, which packs whole weights"
    if recipe.start != "zero":
        return f"start is {recipe.start!r}, which takes A and B out of whole weights"
    config = objective.adapter(skeleton)
    if config.also_train:
        return f"{listed(config.also_train)}: trained whole, from a copy of what is not divided yet"
    if any(kind_of(layer_at(skeleton, name)).stacked for name in select(skeleton, config).ranks):
        return "the forward of its experts is tried with whole weights"
    return obstacle(skeleton, recipe.device, recipe.fsdp == "offload")
