"""torchtune's adapter checkpoints, of the families whose names it shares: Llama, Mistral, Gemma, Qwen 2 and 3.

    layers.N.attn.q_proj.lora_a.weight (R, I)   .lora_b.weight (O, R)   .magnitude (O,)      s = alpha / R, as the recipe says

From `torchtune/models/convert_weights.py`. torchtune's Llama rotates neighbouring numbers of a head where transformers rotates its
halves, so rows of q and k are in another order, those of B and of m alike; the model says how many heads there are.
torchtune's own export to PEFT forgets m: where its adapter_model.pt lies beside, that is read; alone, the export is wrong and
nothing in it says so.
"""

from __future__ import annotations

import re

from torch import Tensor

from ..errors import UserError, listed, with_article
from . import Format, Stated, Written
from .factors import uniform
from .names import ModelNames
from .neutral import NeutralAdapter, NeutralLayer
from .pairs import all_layers, linear_only, magnitude_of, pair_of
from .source import Source

_MODULES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
}  # fmt: skip
_HEAD = {"output": "lm_head"}
_NEIGHBOURS, _HALVES = ("llama", "mistral", "gemma", "gemma2"), ("qwen2", "qwen3")
"""Families by which numbers of a head torchtune rotates together."""


class TorchtuneFormat(Format):
    name = "torchtune"
    title = "torchtune"
    file = "adapter_0.safetensors"
    in_folder = True
    parts = ("lora_a.weight", "lora_b.weight", "magnitude")

    def recognizes(self, source: Source) -> bool:
        return bool(self.endings(source) & {"lora_a.weight", "lora_b.weight"})

    def read(self, source: Source, stated: Stated) -> NeutralAdapter:
        parts = self.parted(source)
        model = _needed(stated.model, str(source.path))
        alpha = stated.alpha if stated.alpha is not None else source.settings.get("lora_alpha")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise UserError(f"{source.path}: torchtune's files do not hold alpha; say it (lora_alpha of the recipe): alpha")
        names = {spelled: _in_transformers(spelled) for spelled in parts}
        if unknown := [spelled for spelled, name in names.items() if name not in model.shapes]:
            raise UserError(f"{source.path}: the model has no module for {listed(unknown, 12)}")

        def build(spelled: str, name: str, own: dict[str, Tensor]) -> NeutralLayer:
            A, B = pair_of(spelled, own, self.parts[:2])
            m = magnitude_of(spelled, "magnitude", own, A, B, stated.magnitude_axis)
            heads = _heads(name, model)
            if heads and len(B) % (2 * heads):
                raise UserError(f"{spelled}.lora_b.weight has {len(B)} rows, which the model's {heads} heads do not divide")
            ordered = (lambda t: _to_halves(t, heads)) if heads else (lambda t: t)
            return NeutralLayer({"lora_A": A, "lora_B": ordered(B)}, alpha / len(A), None if m is None else ordered(m))

        return NeutralAdapter(all_layers(self, source, names, parts, build))

    def cannot_say(self, adapter: NeutralAdapter, stated: Stated) -> str | None:
        if stated.model is None:
            return "torchtune orders the rows of q and k by heads; give the model"
        family = stated.model.setting("model_type")
        if family not in (*_NEIGHBOURS, *_HALVES):
            return _unknown_family(family)
        if unknown := [name for name in adapter.layers if _in_torchtune(name) is None]:
            return f"{listed(unknown, 4)}: torchtune has no name for it"
        return linear_only(adapter, "torchtune's format")

    def write(self, adapter: NeutralAdapter, stated: Stated) -> Written:
        layers, rank, scaling = uniform(adapter)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            key, heads = _in_torchtune(name), _heads(name, stated.model)
            ordered = (lambda t, heads=heads: _to_neighbours(t, heads)) if heads else (lambda t: t)
            tensors |= {f"{key}.lora_a.weight": layer.factors["lora_A"], f"{key}.lora_b.weight": ordered(layer.factors["lora_B"])}
            if layer.magnitude is not None:
                tensors[f"{key}.magnitude"] = ordered(layer.magnitude.reshape(-1))
        modules = sorted({_in_torchtune(name).rpartition(".")[2] for name in layers})
        return Written(tensors, settings={"r": rank, "lora_alpha": scaling * rank, "target_modules": modules})


def _needed(model: ModelNames | None, where: str) -> ModelNames:
    if model is None:
        raise UserError(f"{where} is a torchtune file, whose rows of q and k are ordered by heads; give the model")
    family = model.setting("model_type")
    if family not in (*_NEIGHBOURS, *_HALVES):
        raise UserError(f"{where}: {_unknown_family(family)}")
    return model


def _unknown_family(family: str | None) -> str:
    known = ", ".join((*_NEIGHBOURS, *_HALVES))
    return f"the model is {with_article(repr(family))}; torchtune's names are known for {known}"


def _in_transformers(spelled: str) -> str | None:
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", spelled):
        inner = _MODULES.get(match[2])
        return f"model.layers.{match[1]}.{inner}" if inner else None
    return _HEAD.get(spelled)


def _in_torchtune(name: str) -> str | None:
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        inner = next((own for own, theirs in _MODULES.items() if theirs == match[2]), None)
        return f"layers.{match[1]}.{inner}" if inner else None
    return next((own for own, theirs in _HEAD.items() if theirs == name), None)


def _heads(name: str, model: ModelNames) -> int:
    """Heads by which the rows of this module are ordered, or 0: they are in the same order."""
    if model.setting("model_type") not in _NEIGHBOURS:
        return 0
    heads = model.setting("num_attention_heads")
    return {"q_proj": heads, "k_proj": model.setting("num_key_value_heads") or heads}.get(name.rpartition(".")[2], 0)


def _to_halves(t: Tensor, heads: int) -> Tensor:
    """Rows (heads, pairs, 2) as (heads, 2, pairs)."""
    return t.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _to_neighbours(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


FORMATS = (TorchtuneFormat(),)
