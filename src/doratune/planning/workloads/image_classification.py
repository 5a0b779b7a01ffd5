"""A class for each image: transformers' AutoModelForImageClassification, cross entropy of images."""

from __future__ import annotations

from ...support.image_heads.classification import HEAD
from . import ScoreShape
from .images import Guide, ImageWorkload


class ClassificationWorkload(ImageWorkload):
    """Image classifiers."""

    objective = "image_classification"
    head = HEAD
    asks = 1
    guide = Guide(
        "PEFT's guide to LoRA on a ViT-B/16, at half of its rate, as the magnitude learns too", 128, 16, 16, 0.1, 2.5e-3, 5
    )

    def scores(self, model, examples, length, answer):
        return ScoreShape(len(self.labels()), 2**62)  # a row of them an image: less than what else has as many columns


WORKLOAD = ClassificationWorkload
