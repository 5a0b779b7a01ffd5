"""diffusers' LoRA files, `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights`: PEFT's tensors under a component's name.

    unet.<module>.lora_A.weight (R, I, k…)   .lora_B.weight (O, R, 1…)   .lora_magnitude_vector(.weight) (O,) or (1, O, 1…)

and, in the safetensors header, `lora_adapter_metadata`: PEFT's settings, each as `unet.<setting>`. Without it diffusers takes alpha
= rank. A text encoder is loaded by transformers, which drops a magnitude whose name lacks `.weight`. Older files have
`.lora.down.weight` or `.lora_linear_layer.down.weight`, and an `.alpha` a module. From diffusers 0.42: `loaders/peft.py`,
`utils/state_dict_utils.py`, `utils/peft_utils.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from torch import Tensor

from ..errors import UserError, listed
from ..support.patterns import NamePattern
from . import Format, Stated, Written
from .factors import shaped
from .names import COMPONENTS, resolved
from .neutral import NeutralAdapter, NeutralLayer
from .pairs import all_layers, alpha_of, linear_only, pair_of
from .source import Source, json_object

METADATA = "lora_adapter_metadata"
_PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_REFUSED = (
    "lora_bias",
    "layer_replication",
    "megatron_config",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)


class DiffusersFormat(Format):
    name = "diffusers"
    title = "diffusers"
    file = "pytorch_lora_weights.safetensors"
    parts = (*(part for pair in _PAIRS for part in pair), *_MAGNITUDES, "alpha")

    def recognizes(self, source: Source) -> bool:
        pieces = {piece for key in source.tensors for piece in key.split(".")[-2:]}
        others = pieces & {"magnitude", "dora_scale", "weight_m_wdecomp"} or any(
            k.startswith("base_model.") for k in source.tensors
        )
        return bool(self.endings(source) & {pair[0] for pair in _PAIRS}) and not others

    def read(self, source: Source, stated: Stated) -> NeutralAdapter:
        parts = self.parted(source)
        names, component = resolved(list(parts), str(source.path), stated.model, stated.component)
        metadata = json_object(source.metadata.get(METADATA), f"{source.path}: {METADATA}")
        settings = {k.removeprefix(f"{component}."): v for k, v in metadata.items() if k.startswith(f"{component}.")}
        if metadata and not settings and not component:
            settings = metadata
        if bad := [f"{name}={settings[name]!r}" for name in _REFUSED if settings.get(name)]:
            raise UserError(f"{source.path}: {listed(bad)}: not supported, and ignoring it would change the result")
        if settings.get("bias", "none") != "none":
            raise UserError(f"{source.path}: bias={settings['bias']!r} is not supported, and ignoring it would change the result")

        def build(spelled: str, name: str, own: dict[str, Tensor]) -> NeutralLayer:
            pair = next((pair for pair in _PAIRS if pair[0] in own or pair[1] in own), _PAIRS[0])
            A, B = pair_of(spelled, own, pair)
            vectors = [own[part] for part in _MAGNITUDES if part in own]
            if len(vectors) > 1:
                raise UserError(f"{spelled} has two magnitudes")
            if settings.get("use_dora") and not vectors:
                raise UserError(f"{spelled} has no lora_magnitude_vector, and the file's settings say use_dora")
            m = vectors[0].reshape(-1) if vectors else None
            if m is not None and len(m) != len(B):
                raise UserError(f"{spelled}.lora_magnitude_vector has shape {tuple(vectors[0].shape)}, its layer {len(B)} rows")
            known = stated.alpha is not None or "alpha" in own or "lora_alpha" not in settings
            scaling = alpha_of(spelled, own, len(A), stated.alpha) / len(A) if known else _scaling(name, len(A), settings)
            return NeutralLayer({"lora_A": A, "lora_B": B}, scaling, m)

        return NeutralAdapter(all_layers(self, source, names, parts, build), component=component)

    def cannot_say(self, adapter: NeutralAdapter, stated: Stated) -> str | None:
        component = stated.component or adapter.component
        if component not in COMPONENTS:
            return f"component is {component!r}: diffusers' files name the part of the pipeline; one of {', '.join(COMPONENTS)}"
        return linear_only(adapter, "diffusers' format", convolutions=True)

    def write(self, adapter: NeutralAdapter, stated: Stated) -> Written:
        component, config = stated.component or adapter.component, adapter.config()
        layers = shaped(adapter.layers, stated.model)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            key, A, B = f"{component}.{name}", layer.factors["lora_A"], layer.factors["lora_B"]
            tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
            if layer.magnitude is not None:
                m = layer.magnitude.reshape(-1)
                tensors[f"{key}.lora_magnitude_vector.weight"] = m if A.dim() == 2 else m.view(1, -1, *[1] * (A.dim() - 2))
        ranks = Counter(layer.rank for layer in layers.values())
        rank = max(ranks, key=ranks.get)
        settings = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": config.alpha,
            "lora_dropout": adapter.dropout,
            "target_modules": sorted(layers),
            "rank_pattern": {"^" + re.escape(n): layer.rank for n, layer in layers.items() if layer.rank != rank},
            "alpha_pattern": {"^" + re.escape(n): layer.alpha for n, layer in layers.items() if layer.alpha != config.alpha},
            "use_dora": config.has_magnitude,
            "use_rslora": False,
            "bias": "none",
        }
        text = json.dumps({f"{component}.{name}": value for name, value in settings.items()}, indent=2, sort_keys=True)
        return Written(tensors, {METADATA: text})


def _scaling(name: str, rank: int, settings: dict[str, Any]) -> float:
    """s of one module from PEFT's settings."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{METADATA}: alpha_pattern is {patterns!r}; expected an object")
    fitting = (v for key, v in patterns.items() if NamePattern(rf"(.*\.)?({key})", f"alpha_pattern {key!r}").matches(name))
    alpha = next(fitting, settings["lora_alpha"])
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise UserError(f"{METADATA}: lora_alpha is {alpha!r}; expected a number")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


FORMATS = (DiffusersFormat(),)
