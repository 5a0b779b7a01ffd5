"""A class for each pixel: transformers' …ForSemanticSegmentation."""

from __future__ import annotations

from . import ImageHead

HEAD = ImageHead(
    auto="AutoModelForSemanticSegmentation",
    mark="ForSemanticSegmentation",
    models="MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    shown="model of semantic segmentation",
    does="tells classes of pixels",
    examples="a SegFormer, MobileViT, BEiT, DPT, UperNet …",
)
