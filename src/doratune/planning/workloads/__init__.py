"""What a training step works on, one file an objective: the model without memory, a batch of it, its loss.

    language_modeling.py      text
    image_text.py             text with images
    image_classification.py   a class for each image
    semantic_segmentation.py  a class for each pixel
    vl_bart.py                answers about features of images and video
    dreambooth.py             images of a thing under their prompts
    images.py                 what image models share
    pictures.py               what a model's image processor makes of a photograph

A plan asks here and nowhere else what it counts, so that an objective that is to be planned is one more file. Files that hold
`WORKLOAD`, a subclass, are found by themselves. Source: the models' own code, the objective's own loss. Cost: building on the meta
device.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ...config import AdapterConfig
from ...errors import UserError
from ...support.models import torch_dtype
from ...training.objectives import objective_of
from ..configs import config_of

if TYPE_CHECKING:
    from ..settings import PlanSettings

OWN = ("image_size", "image_count", "classes")
"""Settings of a plan that only some workloads have a use for."""


class ScoreShape(NamedTuple):
    """Which tensors have an entry for each answer: `count` of them along dimension `dim`, and `least` numbers in all."""

    count: int
    least: int
    dim: int = -1


class Workload:
    """Of one model and recipe; subclasses declare and override."""

    objective: str
    """As a recipe names it."""
    unit = "tokens"
    """What the time of a run is counted by."""
    can_checkpoint = True
    """Does the model know gradient checkpointing?"""
    can_quantize = True
    """May its base be stored packed?"""
    least_length: float = 0
    """Tokens that every example has; infinite where an example has no length."""
    whole_numbers = False
    """Does the model's code read numbers of its batch (`whole_numbers.py`)?"""
    between_steps: str | None = None
    """What a run does between its steps that takes memory of its own, in a word."""
    uses: tuple[str, ...] = ()
    """Those of OWN that mean something here."""

    def __init__(self, recipe: PlanSettings, config: Any):
        self.recipe, self.config, self.of_training = recipe, config, objective_of(recipe)
        for name in OWN:
            if name not in self.uses and (value := getattr(recipe, name, None)) not in (None, 1):
                raise UserError(
                    f"{name} is {value}, and {recipe.model} has no use for it under objective {recipe.objective}; drop it"
                )

    @classmethod
    def takes(cls, config: Any) -> bool:
        """Is it for models of this config, among those of its objective?"""
        return True

    @classmethod
    def read_config(cls, recipe: PlanSettings) -> Any:
        """What is known of the recipe's model without its weights."""
        return config_of(recipe.model, recipe.trust_remote_code)

    @property
    def dtype(self) -> torch.dtype:
        """In which the base is loaded."""
        return torch.float32 if self.recipe.method == "full" else torch_dtype(self.recipe.dtype)

    def skeleton(self) -> nn.Module:
        """The model on the meta device.

        Raises:
            UserError: no such model can be made of this config.
        """
        raise NotImplementedError

    def adapter(self, model: nn.Module) -> AdapterConfig:
        """The recipe's adapter, with what would be new in the model trained whole."""
        return self.of_training.adapter(model)

    def dense(self, model: nn.Module) -> tuple[str, ...]:
        """Modules that stay dense in a quantized base."""
        head = model.get_output_embeddings()
        return tuple(name for name, module in model.named_modules() if module is head)

    def bytes_beside(self) -> int:
        """Of what else lies on the device all the time, and is no part of the model."""
        return 0

    def prepare(self, model: nn.Module) -> None:
        """Called once the traced model is ready to train."""

    def inputs(self, model: nn.Module, examples: int, length: int, answer: int | None) -> dict[str, Any]:
        """What the collator of training hands over; inside the trace.

        Raises:
            UserError: the length does not hold what an example has.
        """
        raise NotImplementedError

    def work_between_steps(self) -> None:
        """That work, inside the trace."""

    def loss(self, forward, inputs: dict[str, Any]) -> Tensor:
        """As transformers' Trainer computes it: the model's own, or the objective's."""
        own = self.of_training.trainer_settings().get("compute_loss_func")
        if own is None:
            return forward(**inputs)["loss"]
        given = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
        return own(forward(**given), inputs["labels"], num_items_in_batch=inputs["num_items_in_batch"])

    def scores(self, model: nn.Module, examples: int, length: int, answer: int | None) -> ScoreShape:
        """What the log is to count as logits."""
        return ScoreShape(int(model.config.get_text_config().vocab_size), examples * (answer or length))

    def units(self, settings: PlanSettings) -> int:
        """Of a batch, for the time."""
        return settings.batch_size * settings.max_length

    def example(self, settings: PlanSettings) -> str:
        """The smallest batch in words."""
        return f"one example of {settings.max_length} tokens"

    def shown(self, settings: PlanSettings) -> str:
        """A batch in words."""
        return f"{settings.batch_size} x {settings.max_length} tokens"


@cache
def workloads() -> tuple[type[Workload], ...]:
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    return tuple(module.WORKLOAD for module in modules if hasattr(module, "WORKLOAD"))


def refuse_others(recipe) -> None:
    """Raise UserError for an objective that has no workload, before its model is looked for."""
    if recipe.objective not in (known := sorted({one.objective for one in workloads()})):
        raise UserError(
            f"objective is {recipe.objective}, and doratune plan counts what language models keep, with images or without, and "
            f"those of {', '.join(known)}; try a few steps instead"
        )


def read_config(recipe: PlanSettings) -> Any:
    """What is known of the recipe's model without its weights, as the workloads of its objective read it."""
    refuse_others(recipe)
    return next(one for one in workloads() if one.objective == recipe.objective).read_config(recipe)


def workload_of(recipe, config: Any) -> Workload:
    """The workload of a recipe over models of this config."""
    refuse_others(recipe)
    return next(one for one in workloads() if one.objective == recipe.objective and one.takes(config))(recipe, config)
