"""`doratune train RECIPE.yaml [overrides]`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from .arguments import parse
from .following import after_run
from .inputs import refuse_missing
from .output import keep_freed_memory, print_json, progress, say, say_next

EXAMPLE = "doratune train recipes/commonsense.yaml --model my-llama-7b --rank 8 --output runs/r8"


def main(argv: list[str]) -> int:
    from ..support.processes import launched
    from ..training.launch import launch
    from ..training.objectives import DEFAULT
    from ..training.recipe import TrainRecipe

    recipe, as_json = parse(TrainRecipe, argv, "train", EXAMPLE, recipe=True)
    recipe.check()
    refuse_missing({"data": recipe.data, "eval_data": recipe.eval_data, "tasks": recipe.tasks})
    if recipe.processes > 1 and launched()[1] == 1:
        return launch(recipe.processes, ["train", *argv])
    keep_freed_memory()
    from ..evaluation.evaluate import after_training
    from ..support.processes import is_first
    from ..training.train import Interrupted, train

    if is_first():
        say(chosen_settings(recipe))
    try:
        metrics = train(recipe, say, score=after_training(recipe, say, progress))
    except Interrupted as stop:
        if is_first():
            print(f"doratune train: {stop}", file=sys.stderr)
        return stop.status
    if is_first():
        say_next(*after_run(Path(recipe.output), recipe.objective == DEFAULT))
    if as_json and is_first():
        print_json({k: v for k, v in metrics.items() if k != "log"} | {"output": recipe.output})
    return 0


def chosen_settings(recipe) -> str:
    """The settings that are not the defaults, as YAML, and where all of them will stand."""
    from ..support.yaml_text import to_yaml

    usual = dataclasses.asdict(type(recipe)())
    values = {name: value for name, value in dataclasses.asdict(recipe).items() if value != usual[name]}
    rest = len(usual) - len(values)
    return f"{to_yaml(values)}# the other {rest} settings have their defaults; all are in {Path(recipe.output) / 'recipe.yaml'}"
