"""Image models with a head for labels: a batch of images at the size at which the model's processor hands them over.

The head is new where the config names no class with such a head, or `classes` (`class_names`) asks for other labels; it is then
trained whole beside any adapter. Cost: building on the meta device, twice for a head of another size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import UserError
from ...support.image_heads import ImageHead, head_of
from ...support.image_models import beside_the_body, label_rows, labels_of
from ...support.models import quiet_loading, readable_errors
from . import Workload
from .pictures import config_size, prepared_pictures


class Guide(NamedTuple):
    """A guide's settings for an adapter on such a model; `together`: images of an optimizer step."""

    source: str
    together: int
    rank: int
    alpha: float
    dropout: float
    lr: float
    epochs: int


class ImageWorkload(Workload):
    """Subclasses declare the head and say what labels are."""

    unit = "images"
    least_length = math.inf
    uses = ("image_size", "classes")
    head: ImageHead
    asks: int
    """What it asks of the data: where they would do for several, that which asks most is meant."""
    guide: Guide
    """Settings to start with."""

    def __init__(self, recipe, config):
        super().__init__(recipe, config)
        if not self.head.fits(config.model_type) and self.head.auto not in (getattr(config, "auto_map", None) or {}):
            kind = f"{recipe.model} is a {config.model_type}"
            raise UserError(f"{kind}, of which there is no {self.head.shown}; give {self.head.examples}")
        self.has_head = any(head_of(name) is self.head for name in config.architectures or ())
        self.own = labels_of(config)
        self.size = self._size()
        self.can_checkpoint = self._class().supports_gradient_checkpointing

    def _class(self) -> type[nn.Module]:
        """The class of transformers that the model is of."""
        auto, own = self.head.auto_class(), type(self.config)
        return auto._model_mapping.get(own, PreTrainedModel)

    def labels(self) -> list[str]:
        """Of the run's data, as far as the recipe tells."""
        return self.own if self.recipe.classes is None else [str(number) for number in range(self.recipe.classes)]

    def _size(self) -> tuple[int, ...]:
        """(C, H, W) of an image as the model gets it."""
        recipe, config = self.recipe, self.config
        own = prepared_pictures(recipe)
        if own is not None:
            return tuple(own["pixel_values"].shape[-3:])
        side = (recipe.image_size,) * 2 if recipe.image_size else config_size(config)
        if side is None:
            raise UserError(
                f"{recipe.model} has no preprocessor_config.json beside its config.json, which says how large images are; give "
                "--image_size, such as 224"
            )
        return (getattr(config, "num_channels", 3), *side)

    def skeleton(self) -> nn.Module:
        config, recipe, labels = self.config, self.recipe, self.labels()
        config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
        with quiet_loading(), readable_errors(recipe.model), torch.device("meta"):
            model = self.head.auto_class().from_config(config, dtype=self.dtype, trust_remote_code=recipe.trust_remote_code)
        if recipe.checkpointing != "none" and not self.can_checkpoint:
            raise UserError(
                f"checkpointing is {recipe.checkpointing}, which {type(model).__name__} cannot; set checkpointing: none"
            )
        return model

    def adapter(self, model):
        config = super().adapter(model)
        if self.has_head and self.labels() == self.own:
            return config
        new = {key.rpartition(".")[0] for key in label_rows(model)} if self.has_head else set(beside_the_body(model))
        return replace(config, also_train=tuple(dict.fromkeys((*config.also_train, *sorted(new)))))

    def dense(self, model):
        return tuple(beside_the_body(model))

    def inputs(self, model, examples, length, answer):
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        pixels = torch.empty(examples, *self.size, dtype=dtype)
        labels = torch.zeros(self.label_shape(examples), dtype=torch.long)
        return {"pixel_values": pixels, "labels": labels, "num_items_in_batch": torch.ones((), dtype=torch.long)}

    def label_shape(self, examples: int) -> tuple[int, ...]:
        return (examples,)

    def units(self, settings):
        return settings.batch_size

    def example(self, settings):
        return f"one image of {self.size[1]} x {self.size[2]}"

    def shown(self, settings):
        return f"{settings.batch_size} images of {self.size[1]} x {self.size[2]}"
