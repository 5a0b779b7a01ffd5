"""Models that read images and text and write text (AutoModelForImageTextToText), their processors, and which part of one is
which.

    language     `get_decoder()` and the output head       what is adapted
    vision       the rest: the image tower                 frozen
    projector    between the two                           trained whole, or frozen

A model is one of these if transformers lists its configuration's class as such. Source: transformers.
Cost: names, and a config file.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from ..errors import UserError
from .models import model_path, readable_errors, source_settings

PROJECTORS = ("multi_modal_projector", "connector", "projector", "merger", "mm_projector", "modality_projection")
"""What families of transformers call the projector, where it lies inside the image tower."""


@dataclass(frozen=True)
class ModelParts:
    """Names of modules of a model, each without those inside it.

    Attributes:
        language: the decoder. vision: what stands beside it, the projector left out. projector: see the module."""

    language: str
    vision: tuple[str, ...]
    projector: tuple[str, ...]

    @property
    def beside(self) -> tuple[str, ...]:
        """Everything that is not the language model."""
        return self.vision + self.projector


def load_processor(name: str, trust_remote_code: bool = False):
    """The processor of a model of images and text, its tokenizer with a padding token.

    Raises:
        UserError: it cannot be found or read, or has no image processor or no tokenizer.
    """
    from transformers import AutoProcessor

    path = model_path(name)
    with readable_errors(name):
        processor = AutoProcessor.from_pretrained(path, **source_settings(path, trust_remote_code))
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UserError(f"{name} has no processor of images and text (preprocessor_config.json); copy or download it again")
    tokenizer = processor.tokenizer
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def parts_of(model: nn.Module) -> ModelParts | None:
    """The parts of a model of images and text; None for any other model, and where nothing stands beside the decoder."""
    from transformers import AutoModelForImageTextToText

    if own := getattr(model, "visual_parts", ()):  # a class of ours that says it
        return ModelParts("model.decoder", (), own)
    if type(getattr(model, "config", None)) not in AutoModelForImageTextToText._model_mapping:
        return None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    names = {id(module): name for name, module in model.named_modules()}
    language = names.get(id(decoder), "") if decoder is not None else ""
    if not language:
        return None
    head = names.get(id(model.get_output_embeddings()), "")
    beside = tuple(_outside(model, "", {language, *filter(None, [head])}))
    tower = model.get_encoder(modality="image") if _takes_modality(model) else None
    tower_name = names.get(id(tower), "")
    if not beside or tower_name not in beside:
        return ModelParts(language, beside, ()) if beside else None
    projector = tuple(name for name in beside if name != tower_name)
    if projector:
        return ModelParts(language, (tower_name,), projector)
    inner = [name for name, _ in model.get_submodule(tower_name).named_children()]
    projector = tuple(f"{tower_name}.{name}" for name in inner if name in PROJECTORS)
    vision = tuple(f"{tower_name}.{name}" for name in inner if name not in PROJECTORS) if projector else (tower_name,)
    return ModelParts(language, vision, projector)


def _takes_modality(model: nn.Module) -> bool:
    return hasattr(model, "get_encoder") and "modality" in inspect.signature(model.get_encoder).parameters


def _outside(module: nn.Module, name: str, apart: set[str]):
    """The largest modules that hold none of those apart, in order; those apart are left out."""
    for leaf, child in module.named_children():
        path = f"{name}.{leaf}" if name else leaf
        if path in apart:
            continue
        if any(other.startswith(f"{path}.") for other in apart):
            yield from _outside(child, path, apart)
        elif next(child.parameters(), None) is not None:
            yield path
