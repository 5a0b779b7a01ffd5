"""Image models of transformers with a head for labels of one's own, and their image processors.

A folder's head is kept where it was trained on these labels. Else a new one is drawn: also where it merely has as many outputs as
there are labels now, which `from_pretrained` alone would take for trained and an adapter would then leave frozen. What is new has
no mark of the loader, so that `adapter/fresh.py` sees it. Cost: loading; for that one case two builds without memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError, listed, with_article
from .hub import hub_settings
from .image_heads import ImageHead, head_of, image_heads
from .image_heads.classification import HEAD as CLASSIFICATION
from .models import model_path, one_dtype, quantization, quiet_loading, readable_errors, torch_dtype

PROCESSOR = "preprocessor_config.json"
_MOST_NEW = 0.1
"""Share of the body's numbers that may be new: a pooling layer that another pretraining did without."""
_MARK = "_is_hf_initialized"


def load_processor(name: str, trust_remote_code: bool = False, folder: Path | None = None, head: ImageHead | None = None):
    """The image processor of a model: it resizes and normalizes as the model was pretrained.

    Args:
        folder: of an adapter that has its own. head: that the model is to have, for the message where it can have none.

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
            _config(name, head, trust_remote_code)  # no model of images: that is said instead
            raise UserError(
                f"{name} has no {PROCESSOR}, which says how its images are prepared; copy it from the model it was made of"
            ) from None


def labels_of(config) -> list[str]:
    """The labels of a head's outputs, in order."""
    return [str(config.id2label[i]) for i in sorted(config.id2label)]


def pretrained_labels(name: str, head: ImageHead, trust_remote_code: bool = False) -> list[str]:
    """The labels of a model's own head; none where it has no such head.

    Raises:
        UserError: no model with such a head can be made of it.
    """
    config = _config(name, head, trust_remote_code)
    return labels_of(config) if any(head_of(own) is head for own in config.architectures or ()) else []


def load_image_model(
    name: str,
    labels: Sequence[str],
    dtype: str | torch.dtype = "float32",
    quantize: str | dict = "none",
    double_quantization: bool = False,
    trust_remote_code: bool = False,
    complete: bool = False,
    head: ImageHead = CLASSIFICATION,
) -> nn.Module:
    """The image model `name` in evaluation mode, its head with one output for each label.

    Args:
        complete: refuse a model that lacks its head too: nothing would be loaded over it.

    Raises:
        UserError: it cannot be found or read, can have no such head, or lacks more than a head.
    """
    config, path = _config(name, head, trust_remote_code), model_path(name)
    dtype = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    own = labels_of(config) == list(labels)
    same_size = not own and config.num_labels == len(labels)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    config.problem_type = head.problem_type or config.problem_type
    settings = quantization(quantize, dtype, double_quantization) | {"trust_remote_code": trust_remote_code} | _hub(path)
    if storage := settings.get("quantization_config"):
        storage.llm_int8_skip_modules = _dense_parts(config, head, trust_remote_code)
    with quiet_loading(), readable_errors(name):
        model, info = head.auto_class().from_pretrained(
            path, config=config, dtype=dtype, ignore_mismatched_sizes=not own, output_loading_info=True, **settings
        )
    _refuse_lacking(model, info["missing_keys"], name, complete)
    if same_size:
        _draw_again(model)
    one_dtype(model, dtype)
    model.eval()
    model.name_or_path = model.config._name_or_path = name
    return model


def _config(name: str, head: ImageHead | None, trust_remote_code: bool):
    """The config of `name`, which a model with this head, or with any, can be made of."""
    from transformers import AutoConfig

    path = model_path(name)
    with readable_errors(name):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **_hub(path))
    heads = (head,) if head else image_heads()
    if not any(one.fits(config.model_type) or one.auto in (getattr(config, "auto_map", None) or {}) for one in heads):
        first = heads[0]
        raise UserError(f"{name} is {with_article(config.model_type)}, of which there is no {first.shown}; give {first.examples}")
    return config


def _dense_parts(config, head: ImageHead, trust_remote_code: bool) -> list[str]:
    """The head's modules: they stay dense in a quantized base, where a new head is trained."""
    with torch.device("meta"):
        return beside_the_body(head.auto_class().from_config(config, trust_remote_code=trust_remote_code))


def beside_the_body(model: nn.Module) -> list[str]:
    """Names of the modules with numbers that stand beside the pretrained body: the head."""
    body = _body_of(model)
    return [name for name, child in model.named_children() if name != body and next(child.parameters(), None) is not None]


def _body_of(model: nn.Module) -> str:
    """The name of the part that the head stands on; models over any backbone have it under that name."""
    prefix = model.base_model_prefix
    return prefix if prefix and hasattr(model, prefix) else "backbone"


def _hub(path: str) -> dict:
    return {} if Path(path).is_dir() else hub_settings(path)


def _refuse_lacking(model: nn.Module, missing, name: str, complete: bool) -> None:
    """Raise where more than a head is new, or anything of a model that has to be complete."""
    body = f"{_body_of(model)}."
    sizes = {key: p.numel() for key, p in model.named_parameters() if key.startswith(body)}
    new = sorted(missing if complete else (key for key in missing if key in sizes))
    if (complete and new) or sum(sizes.get(key, 0) for key in new) > _MOST_NEW * sum(sizes.values()):
        raise UserError(f"{name} lacks {listed(new, 3)}; transformers would take random weights: copy or download it again")


def _draw_again(model: nn.Module) -> None:
    """New numbers for what has a row for each label, as the model's class draws them."""
    for key in label_rows(model):
        owner = model.get_submodule(key.rpartition(".")[0])
        for part in (owner, *owner.parameters(recurse=False)):
            if hasattr(part, _MARK):
                delattr(part, _MARK)
    with torch.no_grad():
        model.apply(lambda module: None if hasattr(module, _MARK) else model._initialize_weights(module))


def label_rows(model: nn.Module) -> list[str]:
    """Names of the parameters that have a row for each label."""
    shapes = []
    for more in (0, 1):
        config = type(model.config).from_dict(model.config.to_dict())
        config.num_labels = model.config.num_labels + more
        with torch.device("meta"):
            shapes.append({key: p.shape for key, p in type(model)(config).named_parameters()})
    return [key for key in shapes[0] if shapes[0][key] != shapes[1][key]]
