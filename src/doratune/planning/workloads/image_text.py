"""Text with images: models of transformers under AutoModelForImageTextToText, trained as `docs/vision_language.md` says.

`image_count` pictures stand in each example; their tokens are a part of its length, as in training. How many they are is asked of
the model itself: the features that it makes of what its image processor makes of a photograph. Cost: a pass of the image tower
without numbers.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ...data.image_reader import TYPES
from ...errors import UserError
from ...support.image_text import parts_of
from .language_modeling import TextWorkload, text_inputs
from .pictures import config_size, emptied, prepared_pictures


class ImageTextWorkload(TextWorkload):
    """Models that read images and text."""

    whole_numbers = True
    uses = ("image_size", "image_count")

    def __init__(self, recipe, config):
        super().__init__(recipe, config)
        self.count = recipe.image_count
        self.pictures: dict[str, Tensor] | None = None
        self.guessed = False
        """Are the pictures those of the config, since there is no processor?"""
        self.tokens: int | None = None
        """Of the images of one example; known after a trace."""

    @classmethod
    def takes(cls, config) -> bool:
        return not super().takes(config)

    def skeleton(self) -> nn.Module:
        from transformers import AutoModelForImageTextToText

        return self.built(AutoModelForImageTextToText)

    def dense(self, model):
        parts = parts_of(model)
        return (*super().dense(model), *(parts.beside if parts else ()))

    def inputs(self, model, examples, length, answer):
        inputs = text_inputs(model, examples, length, answer)
        if any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "base_model", None))):
            inputs.pop("position_ids", None)  # its own, from its images
        inputs["attention_mask"][0, 0] = 0  # so that there is a mask, as in batches of examples that are not all of one length
        pictures = emptied(self._pictures(model), examples) if self.count else {}
        self.tokens = self._tokens(model, pictures) // examples if self.count else 0
        if length <= self.tokens:
            raise UserError(
                f"max_length is {length}, and {self.count} image{'s' * (self.count > 1)} of {self.recipe.model} take {self.tokens} "
                f"tokens; give --max_length {self.tokens + 128} or more"
            )
        self.least_length = self.tokens + 1
        ids = inputs["input_ids"]
        mark = next(
            (getattr(self.config, name) for name in ("image_token_id", "image_token_index") if hasattr(self.config, name)), 0
        )
        ids[:, 1 : 1 + self.tokens] = mark
        accepted = inspect.signature(model.forward).parameters
        kinds = {name: (ids == mark).long() for name in TYPES if name in accepted}
        return inputs | kinds | pictures

    def _pictures(self, model) -> dict[str, Tensor]:
        """The inputs of one example's pictures that the model takes."""
        if self.pictures is None:
            own = prepared_pictures(self.recipe, self.count)
            self.guessed = own is None
            if own is None:
                vision = getattr(self.config, "vision_config", self.config)
                size = config_size(vision)
                side = (self.recipe.image_size,) * 2 if self.recipe.image_size else size
                if side is None:
                    raise UserError(_unknown(self.recipe.model))
                own = {"pixel_values": torch.ones(self.count, getattr(vision, "num_channels", 3), *side)}
            accepted = inspect.signature(model.forward).parameters
            self.pictures = {name: value for name, value in own.items() if name in accepted}
        return self.pictures

    @torch.no_grad()
    def _tokens(self, model: nn.Module, pictures: dict[str, Tensor]) -> int:
        """Tokens that the pictures become: rows of the features that the model makes of them."""
        accepted = inspect.signature(model.get_image_features).parameters
        try:
            made = model.get_image_features(**{key: value for key, value in pictures.items() if key in accepted}, return_dict=True)
        except Exception as error:  # the code of any architecture
            if self.guessed:
                raise UserError(_unknown(self.recipe.model)) from error
            raise
        made = getattr(made, "pooler_output", made)
        return sum(part.numel() // part.shape[-1] for part in (made if isinstance(made, list | tuple) else [made]))

    def shown(self, settings):
        images = f", {self.count} image{'s' * (self.count > 1)} of {(self.tokens or 0) // max(1, self.count)} in each"
        return super().shown(settings) + images * bool(self.count and self.tokens)


def _unknown(name: str) -> str:
    lacks = f"how many tokens an image of {name} has is not known without its image processor"
    return f"{lacks}; put preprocessor_config.json beside config.json"


WORKLOAD = ImageTextWorkload
