"""What a model's image processor makes of a photograph, and, where there is none beside its config, what the config says.

Source: transformers' image processors. Cost: preparing one picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...support.models import quiet_loading, source_settings

USUAL = (640, 480)
"""Width and height of a photograph, as COCO's are."""


def prepared_pictures(recipe, count: int = 1) -> dict[str, Tensor] | None:
    """The inputs of one example of `count` pictures; None where the model has no image processor.

    Args:
        recipe: `image_size` is the side of a picture in pixels; None: USUAL.
    """
    processor = _processor(recipe.model, recipe.trust_remote_code)
    if processor is None:
        return None
    from PIL import Image

    size = USUAL if recipe.image_size is None else (recipe.image_size, recipe.image_size)
    try:
        made = processor([[Image.new("RGB", size)] * count], return_tensors="pt", input_data_format="channels_last")
    except Exception as error:  # a processor is a program of others
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the image processor of {recipe.model} does not take a picture of {size[0]} × {size[1]} ({reason})"
        ) from None
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def config_size(config: Any) -> tuple[int, int] | None:
    """(height, width) of the images that a config speaks of."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


def _processor(name: str, trust_remote_code: bool):
    """The image processor beside a config; None where there is none."""
    from transformers import AutoImageProcessor

    path = Path(name)
    place = str(path.parent if path.is_file() else path)
    with quiet_loading():
        try:
            return AutoImageProcessor.from_pretrained(place, backend="pil", **source_settings(place, trust_remote_code))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def emptied(inputs: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """The inputs of so many examples, whole numbers as they are, fractions all 1."""
    return {
        name: torch.ones(times * len(t), *t.shape[1:], dtype=t.dtype)
        if t.is_floating_point()
        else t.repeat(times, *[1] * (t.dim() - 1))
        for name, t in inputs.items()
    }
