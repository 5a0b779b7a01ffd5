"""What scores models that no protocol of text scores, one file an objective of training.

    image_classification.py   classes of images
    semantic_segmentation.py  classes of pixels
    images.py                 what both share: models, tasks, files
    vl_bart.py                answers about images and video, captions

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
from ...support.model_folders import architecture_of, config_of

if TYPE_CHECKING:
    from ...training.recipe import TrainRecipe


class Scorer:
    """Subclasses declare and override."""

    objective: str
    """Of training, as a recipe names it."""
    protocols: tuple[str, ...]
    """Under which its figures go."""
    scores_bases = False
    """Has a base model answers before it is trained? One that gets a new head has none."""

    def scores(self, class_name: str, model_type: str) -> bool:
        """Is this a class of transformers that it scores, or a model of a type that such a class is made of?"""
        raise NotImplementedError

    def after_training(self, recipe: TrainRecipe, say: Callable[[str], None], progress) -> Callable:
        """What scores a run's result on the recipe's tasks: a function of model and processor, with `check` for both."""
        raise NotImplementedError

    def evaluate(self, settings, model: str, say: Callable[[str], None], progress) -> dict:
        """The summary of `doratune evaluate`, by the command's settings, which is written into their output folder."""
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
    name, model_type = None, ""
    if adapter and not baselines.is_baseline(adapter):
        name = wanted_of(Path(adapter)).class_name
    try:
        if name is None:
            name, model_type = architecture_of(model) or "", str(config_of(model).get("model_type"))
    except UserError:  # loading it will say so
        return None
    return next((one for one in scorers() if one.scores(name, model_type)), None)
