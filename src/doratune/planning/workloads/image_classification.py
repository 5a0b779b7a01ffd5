"""A class for each image: transformers' AutoModelForImageClassification, cross entropy of images."""

from __future__ import annotations

from ...support.image_heads.classification import HEAD
from . import ScoreShape
from .images import ImageWorkload


class ClassificationWorkload(ImageWorkload):
    """Image classifiers."""

    objective = "image_classification"
    head = HEAD

    def scores(self, model, examples, length, answer):
        return ScoreShape(len(self.labels()), 2**62)  # a row of them an image: less than what else has as many columns


WORKLOAD = ClassificationWorkload
