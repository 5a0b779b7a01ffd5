"""Training models of images and text: what is adapted, what stays frozen, what is trained whole.

LLaVA's recipe (Liu 2023), as in the paper's section 5.3: adapters on the language model, the projector trained whole, the
image tower frozen. Cost: names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from ..adapter.fresh import fresh_parameters
from ..config import AdapterConfig
from ..errors import UserError
from ..support.image_text import ModelParts, parts_of
from ..support.patterns import excluding


@dataclass(frozen=True, kw_only=True)
class VisualSettings:
    """What a run trains of a model of images and text, beside its language model."""

    projector: Literal["frozen", "whole"] = "frozen"
    """Of a model of images and text: what lies between image tower and language model stays frozen, or is trained whole."""
    vision_tower: Literal["frozen", "adapted"] = "frozen"
    """Of a model of images and text: adapters on the language model alone, or wherever the targets select layers."""


def visual_config(config: AdapterConfig, settings: VisualSettings, model: nn.Module) -> AdapterConfig:
    """The adapter's configuration for this model; that of a model of text as it is.

    Raises:
        UserError: a setting of images for a model of text, or a projector that is not there.
    """
    parts = parts_of(model)
    _refuse_text_model(settings, parts, model)
    if parts is None:
        return config
    if settings.projector == "whole":
        config = replace(config, also_train=tuple(dict.fromkeys((*config.also_train, *parts.projector))))
    if settings.vision_tower == "frozen":
        config = replace(config, exclude=excluding(config.exclude, parts.beside))
    return config


def freeze_vision(model: nn.Module, settings: VisualSettings) -> None:
    """For full fine-tuning: all but the image tower, and the projector where it stays frozen; what no file holds is trained.

    Raises:
        UserError: see `visual_config`.
    """
    parts = parts_of(model)
    _refuse_text_model(settings, parts, model)
    if parts is None:
        return
    frozen = parts.vision * (settings.vision_tower == "frozen") + parts.projector * (settings.projector == "frozen")
    fresh = fresh_parameters(model) if frozen else {}
    for name in frozen:
        for path, p in model.get_submodule(name).named_parameters():
            p.requires_grad_(f"{name}.{path}" in fresh)


def _refuse_text_model(settings: VisualSettings, parts: ModelParts | None, model: nn.Module) -> None:
    name = type(model).__name__
    if parts is None:
        for field, value in (("projector", settings.projector), ("vision_tower", settings.vision_tower)):
            if value != "frozen":
                raise UserError(f"{field} is {value!r}, which is for models of images and text, not for {name}; drop it")
    elif settings.projector == "whole" and not parts.projector:
        raise UserError(f"projector is 'whole', but none is known in {name}; name its module in also_train")
