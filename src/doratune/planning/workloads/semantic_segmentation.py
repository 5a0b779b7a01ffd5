"""A class for each pixel: transformers' AutoModelForSemanticSegmentation, cross entropy at the masks' size."""

from __future__ import annotations

from ...data.masks import names_of_classes
from ...support.image_heads.segmentation import HEAD
from . import ScoreShape
from .images import Guide, ImageWorkload


class SegmentationWorkload(ImageWorkload):
    """Models with a head for masks."""

    objective = "semantic_segmentation"
    head = HEAD
    asks = 2
    guide = Guide("PEFT's guide to LoRA on a SegFormer-B0", 8, 32, 32, 0.1, 5e-4, 20)

    def labels(self):
        return names_of_classes(self.recipe.class_names) or super().labels()

    def prepare(self, model):
        self.of_training.arranged((), model, None, print)  # an auxiliary head's output is a part of the loss

    def label_shape(self, examples):
        return (examples, *self.size[1:])

    def scores(self, model, examples, length, answer):
        """Those at the masks' size."""
        return ScoreShape(len(self.labels()), examples * len(self.labels()) * self.size[1] * self.size[2], dim=1)


WORKLOAD = SegmentationWorkload
