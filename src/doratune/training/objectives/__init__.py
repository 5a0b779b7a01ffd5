"""What a run learns, one file an objective: its processor and model, its examples, what is held against what, how a batch is made.

    language_modeling.py      the next token of text
    image_classification.py   the class of an image
    semantic_segmentation.py  the class of each pixel
    dreambooth.py             a thing from a few images, in a text-to-image pipeline
    vl_bart.py                answers about images and video, captions: several tasks in one run

A recipe's `objective` is the name of a file here, which holds `OBJECTIVE`, a subclass: a new objective is one new file. Which
numbers are trained is the method's business (`methods.py`): each method works under each objective, unless that says otherwise.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.adapter import save
from ...errors import UserError
from ...support.transformers4 import readable_by_both
from ...support.values import shown
from ..visual import visual_config

if TYPE_CHECKING:
    from torch import nn

    from ...config import AdapterConfig
    from ..recipe import TrainRecipe

DEFAULT = "language_modeling"
HELD_OUT = (
    "data_weights", "limit", "eval_data", "eval_size", "tasks", "tasks_protocol", "tasks_limit", "tasks_batch_size", "workers",
    "trust_remote_code",
)  # fmt: skip
"""Settings of several sources, of data that are held out, and of models and data that take long to read."""


class Objective:
    """Of one run; subclasses declare and override. The calls come in this order."""

    unit = "tokens"
    """What a run's speed is counted in."""
    reads: tuple[str, ...] = HELD_OUT
    """Settings of the recipe that this objective reads and another does not. What only others read is refused, not ignored."""

    def __init__(self, recipe: TrainRecipe):
        self.recipe = recipe

    def check(self) -> None:
        """Raise UserError for values of the recipe's settings that cannot be used here, before anything is loaded."""

    def processor(self) -> Any:
        """What turns an item into the model's input and is saved beside the result: a tokenizer, an image processor."""
        raise NotImplementedError

    def examples(self, processor, say: Callable[[str], None], counts: dict[str, dict[str, int]]) -> tuple[Any, Any]:
        """(training examples, evaluation examples), with a length; what was left out is said and counted.

        Raises:
            UserError: data that cannot be read, or an item that cannot be used, unless `bad_items` is skip.
        """
        raise NotImplementedError

    def load(self, dtype: str, quantize: str = "none", double_quantization: bool = False) -> nn.Module:
        """The recipe's model, for these examples, in evaluation mode."""
        raise NotImplementedError

    def skeleton(self) -> nn.Module | None:
        """The recipe's model on the meta device, where `load(blocks=…)` loads one process's part of it; None: it loads all."""
        return None

    def compare(self, model: nn.Module, processor, rows, eval_rows) -> list[str]:
        """Hold the examples against the model; lines to say.

        Raises:
            UserError: the model cannot take them.
        """
        return []

    def adapter(self, model: nn.Module) -> AdapterConfig:
        """The recipe's adapter, for this model.

        Raises:
            UserError: a setting that is for other models.
        """
        return visual_config(self.recipe.adapter(), self.recipe.visual(), model)

    def example(self, model: nn.Module) -> dict | None:
        """An input that the attached model is tried with; None: one is made from its config."""
        return None

    def arranged(self, rows, model: nn.Module, processor, say: Callable[[str], None]) -> Any:
        """The training examples as the prepared model reads them."""
        return rows

    def collator(self, model: nn.Module, processor) -> Callable[[list], dict]:
        """What makes a batch of examples."""
        raise NotImplementedError

    def arguments(self) -> dict:
        """Settings of transformers' TrainingArguments."""
        return {}

    def trainer_settings(self) -> dict:
        """Further arguments of transformers' Trainer."""
        return {}

    def watchers(self, processor, say: Callable[[str], None], checkpoint) -> list:
        """Callbacks that show the run by its own means, once the examples are read. checkpoint: of a run that goes on."""
        return []

    def units_in(self, inputs: dict) -> int | None:
        """Units in a batch, where transformers does not count them itself."""
        return None

    def figures(self) -> dict[str, float]:
        """Figures of the training since they were asked for last, for a line of the log beside its loss."""
        return {}

    def leave(self, processor, folder: Path) -> None:
        """Put beside the result what reads its examples."""
        processor.save_pretrained(folder)
        readable_by_both(folder)

    def save(self, model: nn.Module, folder: Path) -> list[str]:
        """Write the trained adapter; lines to say about it."""
        save(model, folder)
        return []


def names() -> tuple[str, ...]:
    """Every objective, the default first."""
    return tuple(sorted((info.name for info in pkgutil.iter_modules(__path__)), key=lambda name: (name != DEFAULT, name)))


def objective_of(recipe: TrainRecipe) -> Objective:
    """The objective that a recipe names."""
    return kind_named(recipe.objective)(recipe)


def kind_named(name: str) -> type[Objective]:
    """The class of an objective."""
    return importlib.import_module(f".{name}", __name__).OBJECTIVE


def check_objective(recipe: TrainRecipe) -> None:
    """Raise for settings that mean nothing under the recipe's objective, before anything is loaded.

    Raises:
        UserError: the setting and its value, and the objectives that read it.
    """
    reads, unset = {name: kind_named(name).reads for name in names()}, type(recipe)()
    for setting in (f.name for f in dataclasses.fields(recipe)):
        readers, value = [name for name, own in reads.items() if setting in own], getattr(recipe, setting)
        if readers and recipe.objective not in readers and value != getattr(unset, setting):
            own, other = " or ".join(readers), f", or set objective: {readers[0]}" if len(readers) == 1 else ""
            raise UserError(
                f"{setting} is {shown(value)}, which is for objective {own}, not for {recipe.objective}: drop it{other}"
            )
    objective_of(recipe).check()
