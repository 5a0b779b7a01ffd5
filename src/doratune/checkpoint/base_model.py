"""The base model of a result, of the class that was trained on it: a language model, an image model with a head for the result's
labels, or a class of our own.

A language model is loaded as everywhere (`support/models.py`), quantized or not. That it is another class is read from the
adapter's record, the trained model's config, or its own; a head that only the result holds is drawn, and loading the adapter puts
it right. Cost: the model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..errors import UserError
from ..support.image_heads import head_of
from ..support.image_models import labels_of, load_image_model
from ..support.model_folders import SETTINGS, TrainedClass, architecture_of, folder_config, transformers_config
from ..support.models import load_model, model_path
from ..support.own_models import is_own
from .adapter import CONFIG
from .merge import wanted_of


def load_base(
    name: str,
    result: str | Path | None = None,
    dtype: str | torch.dtype = "float32",
    quantize: str | dict = "none",
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model `name` in evaluation mode, as the result was trained on it.

    Args:
        result: folder of an adapter, of a fully fine-tuned model, or of something else, which then says nothing.

    Raises:
        UserError: it cannot be found or read, with the reason.
    """
    want = _trained_class(Path(result)) if result else TrainedClass()
    try:
        class_name = want.class_name or architecture_of(name)
    except UserError:  # loading says it
        class_name = None
    if is_own(class_name):
        from ..support.vl_bart import VisualInput, load_vl_bart

        visual = VisualInput.of(transformers_config(Path(model_path(name)), want))
        return load_vl_bart(name, visual, dtype, quantize, trust_remote_code=trust_remote_code)
    if (head := head_of(class_name)) is None:
        return load_model(name, dtype, quantize, trust_remote_code=trust_remote_code)
    labels = labels_of(transformers_config(Path(model_path(name)), want))
    settings = {"trust_remote_code": trust_remote_code, "complete": not want.class_name, "head": head}
    return load_image_model(name, labels, dtype, quantize, **settings)


def _trained_class(folder: Path) -> TrainedClass:
    """What a result says of its class."""
    if (folder / CONFIG).is_file():
        return wanted_of(folder)
    if (folder / "config.json").is_file():
        config = folder_config(folder)
        return TrainedClass(architecture_of(str(folder)), {name: config[name] for name in SETTINGS if name in config})
    return TrainedClass()
