"""What transformers 5 wrote into a folder, said so that transformers 4 and the engines built on it read the same.

    config.json             rope_parameters {rope_theta: 1e5, rope_type: …}   rope_theta beside it; rope_scaling, where it scales
                            dtype                                             torch_dtype beside it
    tokenizer_config.json   tokenizer_class TokenizersBackend                 PreTrainedTokenizerFast: its name in both
                            extra_special_tokens [<a>, <b>]                   additional_special_tokens: their name in both

Without it transformers 4 refuses the tokenizer, and turns queries and keys by the class's own rope_theta: other outputs, and no
message. A config that transformers 5 would read otherwise afterwards stays as it is, and so do rope parameters by kind of layer
(Gemma 3, ModernBERT), which transformers 4 names differently for each class.
Cost: two small JSON files are read and written; no weight is touched.
"""

from __future__ import annotations

import copy
from pathlib import Path

from .files import read_json, write_json

NAMES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes of tokenizers by their name in both."""


def readable_by_both(folder: Path) -> None:
    """Add to config.json and tokenizer_config.json of this folder, where they are there, what transformers 4 looks for.

    Raises:
        UserError: one of them is no JSON.
    """
    for name, said in (("config.json", _config), ("tokenizer_config.json", _tokenizer)):
        path = folder / name
        if path.is_file():
            before = read_json(path, "it belongs to the folder")
            if (after := said(before)) != before:
                write_json(path, after)


def _config(config: dict) -> dict:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return config
    after, cls = _in_both(config), CONFIG_MAPPING[config["model_type"]]
    was, now = (cls.from_dict(copy.deepcopy(one)).to_dict() for one in (config, after))
    return after if now == was else config


def _in_both(config: dict) -> dict:
    """A config, and the configs of its parts, with the older names beside the newer."""
    parts = {name: _in_both(value) for name, value in config.items() if name.endswith("_config") and isinstance(value, dict)}
    after = config | parts
    turned = config.get("rope_parameters")
    if isinstance(turned, dict) and "rope_theta" in turned:
        beside = {name: turned[name] for name in ("rope_theta", "partial_rotary_factor") if name in turned}
        if turned.get("rope_type", "default") != "default":
            beside["rope_scaling"] = {name: value for name, value in turned.items() if name not in beside}
        after = beside | after
    if isinstance(config.get("dtype"), str):
        after = {"torch_dtype": config["dtype"]} | after
    return after


def _tokenizer(config: dict) -> dict:
    after = config | {"tokenizer_class": NAMES.get(config.get("tokenizer_class"), config.get("tokenizer_class"))}
    if isinstance(config.get("extra_special_tokens"), list) and "additional_special_tokens" not in config:
        after["additional_special_tokens"] = after.pop("extra_special_tokens")
    return {name: value for name, value in after.items() if value is not None or name in config}
