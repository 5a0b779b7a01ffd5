"""Images as a model reads them: opened when they are needed, prepared by the model's own image processor, stacked into batches;
whether a model takes them.

Cost: decoding and resizing an image each time it is read; nothing is held in memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.image_sets import LabelledImage
from ..errors import UserError

if TYPE_CHECKING:
    from PIL import Image


class ImageRows(Dataset):
    """{pixel_values (C, H, W), labels} of each image.

    Args:
        labels: the classes in the order of the model's outputs.
    """

    def __init__(self, items: Sequence[LabelledImage], labels: Sequence[str], processor):
        self.items, self.processor = list(items), processor
        self.numbers = {label: i for i, label in enumerate(labels)}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        item = self.items[index]
        return {"pixel_values": pixels_of(item, self.processor), "labels": self.numbers[item.label], "place": item.place}


def pixels_of(item: LabelledImage, processor) -> Tensor:
    """(C, H, W) in fp32.

    Raises:
        UserError: the image cannot be read, or its processor does not take it.
    """
    return prepared(item.open(), item.place, processor)


def prepared(image: Image.Image, place: str, processor, **settings) -> Tensor:
    """(C, H, W) in fp32 of an image that is open.

    Args:
        settings: of the processor, for this call.

    Raises:
        UserError: its processor does not take it.
    """
    try:
        # said, not guessed: an image of three rows would be taken for one of three channels
        inputs = processor(image, return_tensors="pt", input_data_format="channels_last", **settings)
        return inputs["pixel_values"][0].float()
    except Exception as error:  # a processor is a program of others
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        size = f"{image.width} × {image.height}"
        raise UserError(f"{place}: the image processor does not take this image of {size} ({reason}); remove it") from None


class ImageCollator:
    """Batches of one size, in the model's dtype.

    Returns pixel_values (N, C, H, W) and labels, (N) of images or (N, H, W) of pixels."""

    def __init__(self, dtype: torch.dtype, name: str):
        self.dtype, self.name = dtype, name

    def __call__(self, rows: list[dict]) -> dict:
        first = rows[0]
        for row in rows:
            if row["pixel_values"].shape != first["pixel_values"].shape:
                sizes = [" × ".join(map(str, r["pixel_values"].shape)) for r in (first, row)]
                raise UserError(
                    f"{os.fspath(first['place'])} is {sizes[0]} and {row['place']} {sizes[1]}: the image processor of {self.name} "
                    "does not bring images to one size; set do_resize and size in its preprocessor_config.json"
                )
        pixels = torch.stack([row["pixel_values"] for row in rows]).to(self.dtype)
        return {"pixel_values": pixels, "labels": torch.stack([torch.as_tensor(row["labels"]) for row in rows])}


def dtype_of(model) -> torch.dtype:
    """The dtype that a model's images are given in: that of its own numbers."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@torch.no_grad()
def refuse_unfit(model, row: dict, collate, name: str) -> None:
    """Raise where a model does not take an image as it was prepared.

    Raises:
        UserError: the model's reason.
    """
    batch = collate([row])
    try:
        model(pixel_values=batch["pixel_values"].to(model.device))
    except Exception as error:  # of any model
        size = " × ".join(map(str, batch["pixel_values"].shape[1:]))
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} does not take {row['place']} as its image processor prepares it, {size} ({reason}); make size in "
            "preprocessor_config.json and image_size in config.json agree"
        ) from None
