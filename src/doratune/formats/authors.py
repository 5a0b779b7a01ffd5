"""The files of the paper's own code (NVlabs/DoRA): commonsense reasoning, and LLaVA's visual instruction tuning.

    base_model.model.<module>.lora_A.weight (R, I)   .lora_B.weight (O, R)   .weight_m_wdecomp.weight (O, 1)

in adapter_model.bin, a pickle of tensors, with peft_type DORA in adapter_config.json; modules of `Wdecompose_target_modules`
(LLaVA: `wdecompose_target_modules`) have the magnitude alone. LLaVA may leave `.default` in names, and keeps what was trained whole
in non_lora_trainables.bin. From the two `peft_model.py`, `save_and_load.py` and `dora.py` there. Written is safetensors only.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import UserError
from . import Format, Stated, Written
from .factors import uniform
from .magnitudes import vector_of
from .names import resolved
from .neutral import NeutralAdapter, NeutralLayer
from .pairs import all_layers, linear_only, magnitude_of, pair_of
from .source import Source

_PREFIX = "base_model.model."


class AuthorsFormat(Format):
    name = "authors"
    title = "the DoRA authors'"
    file = "adapter_model.safetensors"
    in_folder = True
    parts = ("lora_A.weight", "lora_B.weight", "weight_m_wdecomp.weight", "weight_m_wdecomp")

    def split(self, key: str) -> tuple[str, str] | None:
        split = super().split(re.sub(r"\.default(?=(\.weight)?$)", "", key))
        return (split[0], "weight_m_wdecomp") if split and "wdecomp" in split[1] else split

    def recognizes(self, source: Source) -> bool:
        return "weight_m_wdecomp" in self.endings(source)

    def read(self, source: Source, stated: Stated) -> NeutralAdapter:
        parts, settings = self.parted(source), source.settings
        if settings.get("bias", "none") != "none":
            raise UserError(f"{source.path}: bias={settings['bias']!r} is not supported, and ignoring it would change the result")
        alpha = stated.alpha if stated.alpha is not None else settings.get("lora_alpha")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise UserError(f"{source.path}: no lora_alpha in adapter_config.json beside it; copy that file there, or say alpha")
        names, _ = resolved(list(parts), str(source.path), stated.model, stated.component)

        def build(spelled: str, name: str, own: dict[str, Tensor]) -> NeutralLayer:
            if set(own) == {"weight_m_wdecomp"}:
                return _magnitude_only(spelled, name, own["weight_m_wdecomp"], stated)
            A, B = pair_of(spelled, own, self.parts[:2])
            return NeutralLayer(
                {"lora_A": A, "lora_B": B},
                alpha / len(A),
                magnitude_of(spelled, "weight_m_wdecomp", own, A, B, stated.magnitude_axis),
            )

        layers = all_layers(self, source, names, parts, build)
        whole = {key.removeprefix(_PREFIX): t for key, t in source.beside.items()}
        model, dropout = settings.get("base_model_name_or_path"), settings.get("lora_dropout")
        return NeutralAdapter(
            layers,
            whole=whole,
            also_train=tuple(sorted({key.rpartition(".")[0] for key in whole})),
            base_model=model if isinstance(model, str) else None,
            dropout=dropout if isinstance(dropout, float) else 0.0,
        )

    def cannot_say(self, adapter: NeutralAdapter, stated: Stated) -> str | None:
        if adapter.method == "lora":
            return "method is 'lora': the authors' DoRA files have a magnitude for every module; write PEFT's"
        return linear_only(adapter, "the authors' format")

    def write(self, adapter: NeutralAdapter, stated: Stated) -> Written:
        layers, rank, scaling = uniform(adapter)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            key = _PREFIX + name
            tensors |= {f"{key}.lora_A.weight": layer.factors["lora_A"], f"{key}.lora_B.weight": layer.factors["lora_B"]}
            tensors[f"{key}.weight_m_wdecomp.weight"] = layer.magnitude.reshape(-1, 1)
        settings = {
            "base_model_name_or_path": adapter.base_model,
            "bias": "none",
            "dora_simple": True,
            "enable_lora": None,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": scaling * rank,
            "lora_dropout": adapter.dropout,
            "merge_weights": False,
            "modules_to_save": None,
            "peft_type": "DORA",
            "r": rank,
            "target_modules": list(layers),
            "task_type": "CAUSAL_LM",
            "Wdecompose_target_modules": None,
        }
        return Written(tensors, settings=settings)


def _magnitude_only(spelled: str, name: str, m: Tensor, stated: Stated) -> NeutralLayer:
    """A module of `Wdecompose_target_modules`: rank 1 with B = 0, which needs the width of its weight."""
    shape = stated.model.shapes.get(name) if stated.model is not None else None
    if shape is None:
        raise UserError(f"{spelled} has a magnitude alone, and nothing says how wide its weight is; give the model")
    vector, _ = vector_of(f"{spelled}.weight_m_wdecomp", m, shape, stated.magnitude_axis, axis="output")
    A = torch.zeros(1, shape[1])
    A[0, 0] = 1.0
    return NeutralLayer({"lora_A": A, "lora_B": torch.zeros(shape[0], 1)}, 1.0, vector, magnitude_only=True)


FORMATS = (AuthorsFormat(),)
