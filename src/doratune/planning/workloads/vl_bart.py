"""VL-BART: an example is two images or one video, whichever has more features, `max_length` tokens of text and an answer.

Features are read from files, so that their image tower is in no memory; its config alone is asked for their width. An answer has
`answer_length` tokens, by default those of published outputs. Cost: building on the meta device.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from transformers import BartConfig

from ...errors import UserError
from ...support.models import quiet_loading, readable_errors, source_settings
from ...support.vl_bart import VISUAL, VisualInput, VLBartForConditionalGeneration
from . import ScoreShape, Workload

ANSWER = 20


class VLBartWorkload(Workload):
    """BART with visual features in front of its text."""

    objective = "vl_bart"
    unit = "examples"

    def __init__(self, recipe, config):
        super().__init__(recipe, config)
        if not isinstance(config, BartConfig) or not config.is_encoder_decoder:
            raise UserError(
                f"{recipe.model} is a {config.model_type}; give a BART with encoder and decoder, such as facebook/bart-base"
            )
        self.own = VisualInput.of(config)
        self.visual = self.own or self._drawn()
        self.features = max(self.visual.images * math.isqrt(recipe.cells) ** 2, recipe.frames)

    def _drawn(self) -> VisualInput:
        """What a BART that reads text alone is given."""
        recipe = self.recipe
        if not recipe.image_tower:
            raise UserError("image_tower is not set, so the width of its features is not known; give it, a hub id or a folder")
        return VisualInput(size=_width(recipe.image_tower, recipe.trust_remote_code), places=max(recipe.cells, recipe.frames))

    def skeleton(self):
        self.config.visual = dataclasses.asdict(self.visual)
        with quiet_loading(), readable_errors(self.recipe.model), torch.device("meta"):
            return VLBartForConditionalGeneration._from_config(self.config, dtype=self.dtype)

    def adapter(self, model):
        config = super().adapter(model)
        new = () if self.own else (VISUAL,)
        return dataclasses.replace(config, also_train=tuple(dict.fromkeys((*config.also_train, *new))))

    def dense(self, model):
        return ("lm_head", VISUAL)

    def prepare(self, model):
        if self.recipe.method == "full" and self.own is None:
            model.get_submodule(VISUAL).requires_grad_(True)

    def inputs(self, model, examples, length, answer):
        text, said = torch.ones(examples, length, dtype=torch.long), torch.ones(examples, answer or ANSWER, dtype=torch.long)
        mask = torch.ones(examples, self.features + length, dtype=torch.long)
        mask[0, -1] = 0  # so that there is a mask, as in batches of examples that are not all of one length
        return {
            "input_ids": text,
            "visual_features": torch.empty(examples, self.features, self.visual.size),
            "visual_places": torch.zeros(examples, self.features, 2, dtype=torch.long),
            "attention_mask": mask,
            "labels": said,
            "decoder_input_ids": torch.ones_like(said),
            "num_items_in_batch": torch.ones((), dtype=torch.long),
        }

    def scores(self, model, examples, length, answer):
        return ScoreShape(int(model.config.vocab_size), examples * (answer or ANSWER))

    def units(self, settings):
        return settings.batch_size

    def shown(self, settings):
        answer = settings.answer_length or ANSWER
        return f"{settings.batch_size} x ({self.features} features, {settings.max_length} tokens, an answer of {answer})"


def _width(name: str, trust_remote_code: bool) -> int:
    """Numbers of a feature of an image tower."""
    from transformers import AutoConfig

    with quiet_loading(), readable_errors(name):
        config = AutoConfig.from_pretrained(name, **source_settings(name, trust_remote_code))
    config = getattr(config, "vision_config", config)
    width = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [None])[-1]
    if width is None:
        raise UserError(
            f"image_tower is {name}, whose config.json says no width of its features (hidden_size); give a CLIP, ViT, ResNet …"
        )
    return int(width)


WORKLOAD = VLBartWorkload
