"""mlx-lm's adapters: a folder with adapters.safetensors and adapter_config.json.

    <module>.lora_a (I, R)   .lora_b (R, O)   .m (O,), of an embedding lora_a (tokens, R), lora_b (R, dimensions), m (tokens,)

From `mlx_lm/tuner/dora.py` and `utils.py`. s is `lora_parameters.scale` itself, one for all. Module names are transformers'.
"""

from __future__ import annotations

import re

from torch import Tensor

from ..errors import UserError
from . import Format, Stated, Written
from .factors import uniform
from .magnitudes import vector_of
from .names import resolved
from .neutral import NeutralAdapter, NeutralLayer
from .pairs import all_layers, linear_only, magnitude_of, pair_of
from .source import SETTINGS, Source


class MlxFormat(Format):
    name = "mlx"
    title = "mlx-lm"
    file = "adapters.safetensors"
    in_folder = True
    parts = ("lora_a", "lora_b", "m")

    def recognizes(self, source: Source) -> bool:
        return bool(self.endings(source) & {"lora_a", "lora_b"})

    def read(self, source: Source, stated: Stated) -> NeutralAdapter:
        parts = self.parted(source)
        settings = source.settings.get("lora_parameters")
        settings = settings if isinstance(settings, dict) else {}
        scale = settings.get("scale")
        if stated.alpha is None and (not isinstance(scale, int | float) or isinstance(scale, bool)):
            raise UserError(f"{source.path}: no lora_parameters.scale in {SETTINGS} beside it; copy that file there, or say alpha")
        names, _ = resolved(list(parts), str(source.path), stated.model, stated.component)

        def build(spelled: str, name: str, own: dict[str, Tensor]) -> NeutralLayer:
            A, B = pair_of(spelled, own, ("lora_a", "lora_b"), flip=True)
            scaling = scale if stated.alpha is None else stated.alpha / len(A)
            if not _is_embedding(name, own, A, B, stated):
                m = magnitude_of(spelled, "m", own, A, B, stated.magnitude_axis)
                return NeutralLayer({"lora_A": A, "lora_B": B}, scaling, m)
            m = None
            if "m" in own:
                m, _ = vector_of(f"{spelled}.m", own["m"], (A.shape[1], len(B)), None, axis="output")
            return NeutralLayer({"embedding_A": A, "embedding_B": B}, scaling, m)

        layers = all_layers(self, source, names, parts, build)
        dropout = settings.get("dropout")
        model = source.settings.get("model")
        return NeutralAdapter(
            layers, base_model=model if isinstance(model, str) else None, dropout=dropout if isinstance(dropout, float) else 0.0
        )

    def cannot_say(self, adapter: NeutralAdapter, stated: Stated) -> str | None:
        for name, layer in adapter.layers.items():
            if layer.embedding and layer.axis == "input" and layer.magnitude is not None:
                return f"{name} has one magnitude per dimension, and mlx-lm's embeddings have one per token"
        return linear_only(adapter, "mlx-lm's format", embeddings=True)

    def write(self, adapter: NeutralAdapter, stated: Stated) -> Written:
        layers, rank, scaling = uniform(adapter)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            A, B = layer.factors.values()
            tensors |= {f"{name}.lora_a": A.T.contiguous(), f"{name}.lora_b": B.T.contiguous()}
            if layer.magnitude is not None:
                tensors[f"{name}.m"] = layer.magnitude.reshape(-1)
        keys = sorted({re.sub(r"^.*?layers\.\d+\.", "", name) for name in layers})
        settings = {
            "fine_tune_type": adapter.method,
            "model": adapter.base_model or "",
            "num_layers": -1,
            "lora_parameters": {"rank": rank, "scale": scaling, "dropout": adapter.dropout, "keys": keys},
        }
        return Written(tensors, settings=settings)


def _is_embedding(name: str, own: dict[str, Tensor], A: Tensor, B: Tensor, stated: Stated) -> bool:
    """A is (R, tokens) then, and m has one number for each of these. A square one is asked of the model, or of its name."""
    if stated.model is not None:
        return name in stated.model.embeddings
    if "m" in own and A.shape[1] != len(B):
        return own["m"].numel() == A.shape[1]
    return "embed" in name.rpartition(".")[2]


FORMATS = (MlxFormat(),)
