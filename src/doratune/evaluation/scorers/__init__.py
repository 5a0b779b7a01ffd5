"""What scores models that are no language models, one file an objective of training.

    image_classification.py   classes of images

A scorer knows which classes of transformers it scores, so that `doratune evaluate` need not be told; `tasks` of a recipe go to that
of its objective. Files in this folder that hold `SCORER`, an instance without state, are found by themselves. Language models have
none: `evaluate.py` scores them by protocols.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ... import baselines
from ...checkpoint.merge import wanted_of
from ...errors import UserError
from ...support.model_folders import architecture_of

if TYPE_CHECKING:
    from ...cli.evaluate import EvaluateSettings
    from ...training.recipe import TrainRecipe


class Scorer:
    """Subclasses declare and override."""

    objective: str
    """Of training, as a recipe names it."""
    protocols: tuple[str, ...]
    """Under which its figures go."""
    scores_bases = False
    """Has a base model answers before it is trained? One that gets a new head has none."""

    def scores(self, class_name: str) -> bool:
        """Is this a class of transformers that it scores?"""
        raise NotImplementedError

    def after_training(self, recipe: TrainRecipe, say: Callable[[str], None], progress) -> Callable:
        """What scores a run's result on the recipe's tasks: a function of model and processor, with `check` for both."""
        raise NotImplementedError

    def evaluate(self, settings: EvaluateSettings, model: str, say: Callable[[str], None], progress) -> dict:
        """The summary of `doratune evaluate`, which is written into its output folder."""
        raise NotImplementedError

    def show(self, summary: dict) -> str:
        """The summary as a table of text."""
        raise NotImplementedError


@cache
def scorers() -> tuple[Scorer, ...]:
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    return tuple(module.SCORER for module in modules if hasattr(module, "SCORER"))


def scorer_of(objective: str) -> Scorer | None:
    """The scorer of an objective; None for language models."""
    return next((one for one in scorers() if one.objective == objective), None)


def scorer_for(model: str, adapter: str | None) -> Scorer | None:
    """The scorer of what an adapter was trained on, or of a model alone; None for language models."""
    name = None
    if adapter and not baselines.is_baseline(adapter):
        name = wanted_of(Path(adapter)).class_name
    try:
        name = name or architecture_of(model)
    except UserError:  # loading it will say so
        return None
    return next((one for one in scorers() if name and one.scores(name)), None)
