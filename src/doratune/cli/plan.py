"""`doratune plan`: does a training run fit, and what takes the memory? From the model's config, without its weights."""

from __future__ import annotations

import dataclasses

from .arguments import parse
from .output import print_json, say, say_next

EXAMPLE = "doratune plan recipes/commonsense.yaml --model my-llama-7b --rank 8 --quantize nf4 --memory 24"


def main(argv: list[str]) -> int:
    from ..planning.settings import PlanSettings

    settings, as_json = parse(PlanSettings, argv, "plan", EXAMPLE, recipe=True)
    settings.check()
    from ..planning.plan import Planner
    from ..planning.text import lines

    plan = Planner(settings).plan()
    for line in lines(plan):
        say(line)
    if argv and not argv[0].startswith("-"):
        say_next(("train", argv[0], *_of_training(argv[1:])))
    else:
        say_next(("init", "my.jsonl", "--model", settings.model))
    if as_json:
        print_json(plan.to_dict())
    return 0


def _of_training(words: list[str]) -> list[str]:
    """Of the words behind a recipe those that doratune train takes too: not --memory, and --device means another device there."""
    from ..planning.settings import PlanSettings
    from ..training.recipe import TrainRecipe

    taken = {field.name for field in dataclasses.fields(TrainRecipe)} - set(PlanSettings.__annotations__)
    chosen, takes = [], False
    for word in words:
        if word.startswith("--"):
            takes = word[2:].partition("=")[0] in taken
        chosen += [word] * takes
    return chosen
