"""Batches of a model of images and text: the text's as ever, and what the processor makes of the images of their rows.

Where a model computes positions of its own from its images (Qwen-VL), none are given. Cost: opening and scaling each image,
on the CPU.
"""

from __future__ import annotations

from .encode import AnswerCollator
from .image_reader import ImageReader


class ImageTextCollator:
    """Batches of rows that may have `images`.

    Returns what `AnswerCollator` does, with pixel_values and what else the model wants of its images."""

    def __init__(self, reader: ImageReader, model):
        self.reader, self.text = reader, AnswerCollator(reader.pad_token_id, model)
        if any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "base_model", None))):
            self.text.positions = False

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.text(rows)
        return batch | self.reader.types(batch["input_ids"]) | self.reader.inputs([row.get("images", ()) for row in rows])
