"""A class for each image: transformers' …ForImageClassification."""

from __future__ import annotations

from . import ImageHead

HEAD = ImageHead(
    auto="AutoModelForImageClassification",
    mark="ForImageClassification",
    models="MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    shown="image classifier",
    does="tells classes of images",
    examples="a ViT, Swin, ResNet …",
    problem_type="single_label_classification",
)
