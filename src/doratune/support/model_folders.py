"""Model folders of transformers and diffusers: which class they hold, its modules without memory, and the loaded model.

    config.json             weights                                     class
    `architectures`         model.safetensors (or its index)            transformers': AutoModel… where none is named
    `_class_name`           diffusion_pytorch_model.safetensors         diffusers'

An adapter may have been trained on another class than its base folder names (a classifier over a language model) and with other
labels: `class_record` is what has to be known of it, `TrainedClass` that again. A larger vocabulary is seen in what it trained.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError, listed, near_misses, with_article
from .files import read_json
from .models import model_path, readable_errors
from .own_models import own_class, own_library

SETTINGS = ("id2label", "label2id", "problem_type", "reduce_labels", "visual")
"""Of a transformers config: what a head, or an input, of one's own brings along."""

TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types → the class of transformers that they are trained on."""


@dataclass
class TrainedClass:
    """The class that an adapter was trained on, and settings of its config; without a class: the folder's own."""

    class_name: str | None = None
    settings: dict = field(default_factory=dict)


def class_record(model: nn.Module) -> dict | None:
    """Class and settings of a model of transformers or diffusers, as plain data; None for others."""
    cls = getattr(type(model), "plain_class", type(model))
    if (fsdp := getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)) and issubclass(cls, fsdp):
        cls = cls.__bases__[1]  # fully_shard puts a class of its own in front
    library = own_library(cls) or cls.__module__.partition(".")[0]
    if library not in ("transformers", "diffusers"):
        return None
    config = getattr(model, "config", None)
    settings = {name: value for name in SETTINGS if (value := getattr(config, name, None)) is not None}
    return {"class": cls.__name__, "library": library, "settings": settings}


def wanted(raw: dict, own: dict) -> TrainedClass:
    """What doratune.json (own) records, else what PEFT's adapter_config.json (raw) says of the class."""
    record = own.get("model")
    if isinstance(record, dict) and isinstance(record.get("class"), str):
        settings = record.get("settings")
        return TrainedClass(record["class"], dict(settings) if isinstance(settings, dict) else {})
    mapping = raw.get("auto_mapping")
    if isinstance(mapping, dict) and isinstance(mapping.get("base_model_class"), str):
        return TrainedClass(mapping["base_model_class"])
    return TrainedClass(TASKS.get(raw.get("task_type")) if raw.get("task_type") != "CAUSAL_LM" else None)


def folder_config(folder: Path) -> dict:
    """config.json of a model folder."""
    return read_json(folder / "config.json", "a model folder needs it")


def architecture_of(name: str) -> str | None:
    """The class that the config of a model names first; None where it names none.

    Raises:
        UserError: no such model, or its config cannot be read.
    """
    names = config_of(name).get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def config_of(name: str) -> dict:
    """The config of a model: of a folder, of the hub, or of the wheel.

    Raises:
        UserError: no such model, or its config cannot be read.
    """
    from transformers import PretrainedConfig

    from .hub import hub_settings

    path = model_path(name)
    if Path(path).is_dir():
        return folder_config(Path(path))
    with readable_errors(name):
        return PretrainedConfig.get_config_dict(path, **hub_settings(path))[0]


def is_diffusers(config: dict) -> bool:
    return isinstance(config.get("_class_name"), str)


def weights_name(config: dict) -> str:
    """Name of the one file of weights; an index has `.index.json` behind it."""
    return "diffusion_pytorch_model.safetensors" if is_diffusers(config) else "model.safetensors"


def model_class(folder: Path, want: TrainedClass | None = None) -> type:
    """The class that a folder's model is of, or that is wanted of it.

    Raises:
        UserError: neither transformers nor diffusers knows it.
    """
    config = folder_config(folder)
    if is_diffusers(config):
        try:
            import diffusers as library
        except ImportError:
            raise UserError(f"{folder} is a diffusers model; run: pip install 'doratune[images]'") from None
        name = config["_class_name"]
    else:
        import transformers as library

        names = config.get("architectures") or []
        name = names[0] if names else _auto(config)
        wish = want.class_name if want and want.class_name else name
        if _is_for(own_class(wish) or getattr(library, wish, None), config):
            name = wish
    cls = own_class(name) or getattr(library, name, None)
    if not isinstance(cls, type):
        known = [n for n in dir(library) if not n.startswith("_")]
        code = "it is code of the folder's own" if config.get("auto_map") else f"{library.__name__} has no such class"
        raise UserError(
            f"{folder} holds {with_article(name)}: {code}{near_misses(name, known)}; merge takes model folders of transformers and "
            "diffusers: load this one yourself, then doratune.load the adapter, doratune.merge, save_pretrained"
        )
    return cls


def _is_for(cls, config: dict) -> bool:
    """Does this class take the folder's config? An adapter may have been trained on another family."""
    own = getattr(getattr(cls, "config_class", None), "model_type", None)
    return hasattr(cls, "_model_mapping") or (own is not None and own == config.get("model_type"))


def _auto(config: dict) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return "AutoModelForCausalLM" if config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "AutoModel"


def meta_model(folder: Path, want: TrainedClass | None = None, shapes: dict[str, tuple[int, ...]] | None = None) -> nn.Module:
    """The folder's modules without any memory; shapes: of trained parameters, which tell the number of labels."""
    cls = model_class(folder, want)
    with readable_errors(str(folder)), torch.device("meta"):
        if is_diffusers(folder_config(folder)):
            return cls.from_config(cls.load_config(folder))
        config = transformers_config(folder, want)
        model = _built(cls, config)
        if _fitted(model, config, shapes or {}):
            model = _built(cls, config)
    return model


def _built(cls: type, config) -> nn.Module:
    return cls.from_config(config, trust_remote_code=False) if hasattr(cls, "_model_mapping") else cls(config)


def transformers_config(folder: Path, want: TrainedClass | None = None):
    """The folder's config with the settings that are wanted."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for name, value in (want.settings if want else {}).items():
        if name in SETTINGS:
            setattr(config, name, {int(k): v for k, v in value.items()} if name == "id2label" else value)
    return config


def embeddings_of(model: nn.Module):
    """The table of the vocabulary, or None."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # what transformers' classes without a vocabulary raise
        return None


def _fitted(model: nn.Module, config, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Take the number of labels and the size of the vocabulary from trained parameters; did that change anything?"""
    table = embeddings_of(model)
    for name, shape in shapes.items():
        p = dict(model.named_parameters(remove_duplicate=False)).get(name)
        if p is None or not shape or tuple(p.shape) == tuple(shape):
            continue
        if p.shape[0] == getattr(table, "num_embeddings", None):
            config.get_text_config().vocab_size = shape[0]
            return True
        if p.shape[0] == getattr(config, "num_labels", None):
            config.num_labels = shape[0]
            return True
    return False


def changed_config(folder: Path, model: nn.Module, other_class: bool) -> dict:
    """Entries of config.json that the result has otherwise than its base: labels, vocabulary, and the class if it is another."""
    before, config = folder_config(folder), model.config
    if is_diffusers(before):
        return {}
    changes = {"architectures": [type(model).__name__]} if other_class else {}
    base = transformers_config(folder)
    if other_class or any(
        getattr(base, name, None) != getattr(config, name, None) for name in ("id2label", "reduce_labels", "visual")
    ):
        for name in SETTINGS:
            if (value := getattr(config, name, None)) is not None:
                changes[name] = {str(k): v for k, v in value.items()} if name == "id2label" else value
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size != getattr(base.get_text_config(), "vocab_size", None):
        inner = next((name for name, value in before.items() if isinstance(value, dict) and "vocab_size" in value), None)
        changes |= (
            {"vocab_size": size} if "vocab_size" in before or inner is None else {inner: before[inner] | {"vocab_size": size}}
        )
    return changes


def load_folder(
    folder: Path, dtype: torch.dtype, want: TrainedClass | None = None, shapes: dict[str, tuple[int, ...]] | None = None
) -> nn.Module:
    """The folder's model in evaluation mode; shapes: of what an adapter, which is loaded next, holds in the folder's place.

    Raises:
        UserError: it cannot be read, or lacks weights.
    """
    from .models import quiet_loading

    cls = model_class(folder, want)
    with quiet_loading(), readable_errors(str(folder)):
        if is_diffusers(folder_config(folder)):
            return cls.from_pretrained(folder, torch_dtype=dtype).eval()
        config = transformers_config(folder, want) if shapes is None else meta_model(folder, want, shapes).config
        settings = {"config": config, "ignore_mismatched_sizes": shapes is not None}
        model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, **settings)
    if missing := sorted(info["missing_keys"]) if shapes is None else []:
        raise UserError(f"{folder} lacks {listed(missing, 3)}; transformers would take random weights: copy or download it again")
    return model.eval()


def is_causal(folder: Path, want: TrainedClass | None = None) -> bool:
    """Is it a language model that a tokenizer's sentences are for?"""
    name = model_class(folder, want).__name__
    return bool(re.search(r"(ForCausalLM|LMHeadModel)$", name))
