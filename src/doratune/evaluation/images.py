"""The images of items: in their prompts, and as what the model gets beside them.

An item of a user's own names its images as its format does. Any other says where its image is by `image` and the folders in
`image_folders`; None is a question without one. The prompt of such an item with the key `image` is a turn in the model's chat
template; without it, it is its text. Cost: each image is
decoded twice, once for the length of its prompt, once for its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..data.image_sources import ImageSource, source_of
from ..errors import UserError
from .own_items import OwnItem


def sources(item: Mapping) -> list[ImageSource]:
    """The item's images, in the order of its prompt.

    Raises:
        UserError: a value that names none.
    """
    if isinstance(item, OwnItem):
        return item.sources()
    return [] if item.get("image") is None else [source_of(item["image"], item.get("image_folders", ()))]


def place_of(item: Mapping) -> str | None:
    """The path of an item's image; None of an item without one, or that holds its image itself."""
    place = next((source.place for source in sources(item)), None)
    return place if isinstance(place, str) else None


def prompt_tokens(tokenizer, text: str, item: Mapping) -> list[int]:
    """The tokens of an item's prompt.

    Raises:
        UserError: an image for a model of text, or one that cannot be read; with the item's place.
    """
    if "image" not in item:
        return tokenizer(text)["input_ids"]
    where = item.get("where", "the item")
    if not getattr(tokenizer, "in_parts", False):
        raise UserError(
            f"{where} has an image, and {tokenizer.name_or_path or 'the model'} reads text alone; evaluate another model"
        )
    try:
        return tokenizer.question(text, sources(item))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def image_inputs(tokenizer, items: Sequence[Mapping], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model gets beside the tokens (B, T) of these items, on their device; nothing of items of text."""
    images = [sources(item) for item in items]
    if not any(images) and not any("image" in item for item in items):
        return {}
    inputs = tokenizer.types(ids) | tokenizer.inputs(images)
    return {name: value.to(ids.device) for name, value in inputs.items()}
