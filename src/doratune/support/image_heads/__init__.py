"""Heads on pretrained image models, one file a head: which classes of transformers have it, and how messages speak of them.

    classification.py   a class for each image
    segmentation.py     a class for each pixel

Loading, merging, cards and scorers ask here which head a class has. A head is an instance without state; files in this folder that
hold `HEAD` are found by themselves. Cost: none; transformers is imported when its lists are needed.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class ImageHead:
    """One kind of head.

    Attributes:
        auto: the class of transformers that opens any model with it.
        mark: what the names of the classes that have it hold.
        models: the name of transformers' list of the models that can get it.
        shown, does, examples: a model with it, what the head does, models that have it; for messages.
        problem_type: what transformers' config calls the task; none where it has no such word.
    """

    auto: str
    mark: str
    models: str
    shown: str
    does: str
    examples: str
    problem_type: str | None = None

    def auto_class(self) -> type:
        import transformers

        return getattr(transformers, self.auto)

    def fits(self, model_type: str) -> bool:
        """Has transformers a class with this head for a model of this type?"""
        from transformers.models.auto import modeling_auto

        return model_type in getattr(modeling_auto, self.models)


@cache
def image_heads() -> tuple[ImageHead, ...]:
    return tuple(importlib.import_module(f".{info.name}", __name__).HEAD for info in pkgutil.iter_modules(__path__))


def head_of(class_name: str | None) -> ImageHead | None:
    """The head that a class of transformers has; None where it is none of these."""
    return next((head for head in image_heads() if head.mark in (class_name or "")), None)


def head_for(class_name: str | None, model_type: str) -> ImageHead | None:
    """The head of a class, or else the first that a body of this type can get; None for what is, or can be, a language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as SPEAKING

    if (own := head_of(class_name)) is not None or model_type in SPEAKING:
        return own
    return next((head for head in image_heads() if head.fits(model_type)), None)
