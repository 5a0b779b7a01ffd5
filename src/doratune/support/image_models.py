"""Image classifiers of transformers and their image processors, for labels of one's own.

A folder's head is kept where it was trained on these labels. Else a new one is drawn: also where it merely has as many outputs as
there are labels now, which `from_pretrained` alone would take for trained and an adapter would then leave frozen. What is new has
no mark of the loader, so that `adapter/fresh.py` sees it. Cost: loading; for that one case two builds without memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError, listed
from .hub import hub_settings
from .models import model_path, one_dtype, quantization, quiet_loading, readable_errors, torch_dtype

PROCESSOR = "preprocessor_config.json"
_MOST_NEW = 0.1
"""Share of the body's numbers that may be new: a pooling layer that another pretraining did without."""
_MARK = "_is_hf_initialized"


def load_processor(name: str, trust_remote_code: bool = False, folder: Path | None = None):
    """The image processor of a model: it resizes and normalizes as the model was pretrained.

    Args:
        folder: of an adapter that has its own.

    Raises:
        UserError: the model has none, or it cannot be read.
    """
    from transformers import AutoImageProcessor

    path = str(folder) if folder else model_path(name)
    with quiet_loading(), readable_errors(name):
        try:
            return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=trust_remote_code, **_hub(path))
        except OSError as error:
            if PROCESSOR not in str(error):
                raise
            _config(name, trust_remote_code)  # no model of images: that is said instead
            raise UserError(
                f"{name} has no {PROCESSOR}, which says how its images are prepared; copy it from the model it was made of"
            ) from None


def is_classifier(class_name: str) -> bool:
    """Is this a class of image classifiers?"""
    return "ForImageClassification" in class_name


def is_image_body(model_type: str) -> bool:
    """Can a classifier of images be made of a model of this type, and no language model?"""
    from transformers.models.auto import modeling_auto as known

    return (
        model_type in known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        and model_type not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )


def labels_of(config) -> list[str]:
    """The labels of a classifier's outputs, in order."""
    return [str(config.id2label[i]) for i in sorted(config.id2label)]


def pretrained_labels(name: str, trust_remote_code: bool = False) -> list[str]:
    """The labels of a model's own head; none where it has no head for images.

    Raises:
        UserError: no image classifier can be made of it.
    """
    config = _config(name, trust_remote_code)
    return labels_of(config) if any(map(is_classifier, config.architectures or ())) else []


def load_classifier(
    name: str,
    labels: Sequence[str],
    dtype: str | torch.dtype = "float32",
    quantize: str | dict = "none",
    double_quantization: bool = False,
    trust_remote_code: bool = False,
    complete: bool = False,
) -> nn.Module:
    """The image classifier `name` in evaluation mode, with one output for each label.

    Args:
        complete: refuse a model that lacks its head too: nothing would be loaded over it.

    Raises:
        UserError: it cannot be found or read, is no image model, or lacks more than a head.
    """
    from transformers import AutoModelForImageClassification

    config, path = _config(name, trust_remote_code), model_path(name)
    dtype = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    own = labels_of(config) == list(labels)
    same_size = not own and config.num_labels == len(labels)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    settings = quantization(quantize, dtype, double_quantization) | {"trust_remote_code": trust_remote_code} | _hub(path)
    if storage := settings.get("quantization_config"):
        storage.llm_int8_skip_modules = _heads(config, trust_remote_code)
    with quiet_loading(), readable_errors(name):
        model, info = AutoModelForImageClassification.from_pretrained(
            path, config=config, dtype=dtype, ignore_mismatched_sizes=not own, output_loading_info=True, **settings
        )
    _refuse_lacking(model, info["missing_keys"], name, complete)
    if same_size:
        _draw_again(model)
    one_dtype(model, dtype)
    model.eval()
    model.name_or_path = model.config._name_or_path = name
    return model


def _config(name: str, trust_remote_code: bool):
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    path = model_path(name)
    with readable_errors(name):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **_hub(path))
    if config.model_type not in KNOWN and "AutoModelForImageClassification" not in (getattr(config, "auto_map", None) or {}):
        raise UserError(f"{name} is a {config.model_type}, of which there is no image classifier; give a ViT, Swin, ResNet …")
    return config


def _heads(config, trust_remote_code: bool) -> list[str]:
    """What stands beside the body: it stays dense in a quantized base, where a new head is trained."""
    from transformers import AutoModelForImageClassification

    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=trust_remote_code)
    beside = [(name, child) for name, child in model.named_children() if name != model.base_model_prefix]
    return [name for name, child in beside if next(child.parameters(), None) is not None]


def _hub(path: str) -> dict:
    return {} if Path(path).is_dir() else hub_settings(path)


def _refuse_lacking(model: nn.Module, missing, name: str, complete: bool) -> None:
    """Raise where more than a head is new, or anything of a model that has to be complete."""
    body = f"{model.base_model_prefix}."
    sizes = {key: p.numel() for key, p in model.named_parameters() if key.startswith(body)}
    new = sorted(missing if complete else (key for key in missing if key in sizes))
    if (complete and new) or sum(sizes.get(key, 0) for key in new) > _MOST_NEW * sum(sizes.values()):
        raise UserError(f"{name} lacks {listed(new, 3)}; transformers would take random weights: copy or download it again")


def _draw_again(model: nn.Module) -> None:
    """New numbers for what has a row for each label, as the model's class draws them."""
    shapes = []
    for more in (0, 1):
        config = type(model.config).from_dict(model.config.to_dict())
        config.num_labels = model.config.num_labels + more
        with torch.device("meta"):
            shapes.append({key: p.shape for key, p in type(model)(config).named_parameters()})
    for key in [key for key in shapes[0] if shapes[0][key] != shapes[1][key]]:
        owner = model.get_submodule(key.rpartition(".")[0])
        for part in (owner, *owner.parameters(recurse=False)):
            if hasattr(part, _MARK):
                delattr(part, _MARK)
    with torch.no_grad():
        model.apply(lambda module: None if hasattr(module, _MARK) else model._initialize_weights(module))
