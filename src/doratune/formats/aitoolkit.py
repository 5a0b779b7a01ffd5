"""ai-toolkit's files: PEFT's A and B under a network's own names, m (O,) as `magnitude`, or (O, 1) as ComfyUI's `dora_scale`.

    transformer.<module>.lora_A.weight (R, I)   .lora_B.weight (O, R)   .magnitude (O,)     also lora_down, lora_up; no alpha: s = 1

From `toolkit/models/DoRA.py` and `toolkit/lora_special.py`: with PEFT's names alpha is the rank, and is not written. Linear layers.
"""

from __future__ import annotations

from torch import Tensor

from . import Format, Stated, Written
from .names import COMPONENTS, resolved
from .neutral import NeutralAdapter, NeutralLayer
from .pairs import all_layers, alpha_of, linear_only, magnitude_of, pair_of
from .source import Source

_PEFT, _KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


class AiToolkitFormat(Format):
    name = "ai-toolkit"
    title = "ai-toolkit"
    file = "adapter.safetensors"
    parts = (*_PEFT, *_KOHYA, "magnitude", "dora_scale", "alpha")

    def recognizes(self, source: Source) -> bool:
        ends = self.endings(source)
        return ("magnitude" in ends and bool(ends & {*_PEFT, *_KOHYA})) or {"dora_scale", "lora_A.weight"} <= ends

    def read(self, source: Source, stated: Stated) -> NeutralAdapter:
        parts = self.parted(source)
        names, component = resolved(list(parts), str(source.path), stated.model, stated.component)

        def build(spelled: str, name: str, own: dict[str, Tensor]) -> NeutralLayer:
            A, B = pair_of(spelled, own, _KOHYA if _KOHYA[0] in own else _PEFT)
            alpha = alpha_of(spelled, own, len(A), stated.alpha)
            part = "dora_scale" if "dora_scale" in own else "magnitude"
            m = magnitude_of(spelled, part, own, A, B, stated.magnitude_axis)
            return NeutralLayer({"lora_A": A, "lora_B": B}, alpha / len(A), m)

        return NeutralAdapter(all_layers(self, source, names, parts, build), component=component)

    def cannot_say(self, adapter: NeutralAdapter, stated: Stated) -> str | None:
        if (stated.component or adapter.component) not in COMPONENTS:
            return f"component is {stated.component or adapter.component!r}; expected one of {', '.join(COMPONENTS)}"
        if adapter.method == "lora":
            return "method is 'lora': without a magnitude ai-toolkit's file is diffusers'; write that"
        return linear_only(adapter, "ai-toolkit's format")

    def write(self, adapter: NeutralAdapter, stated: Stated) -> Written:
        component = stated.component or adapter.component
        tensors: dict[str, Tensor] = {}
        for name, layer in adapter.layers.items():
            key, B = f"{component}.{name}", layer.factors["lora_B"]
            tensors[f"{key}.lora_A.weight"] = layer.factors["lora_A"]
            tensors[f"{key}.lora_B.weight"] = B if layer.scaling == 1 else B.float() * layer.scaling
            tensors[f"{key}.magnitude"] = layer.magnitude.reshape(-1)
        return Written(tensors)


FORMATS = (AiToolkitFormat(),)
