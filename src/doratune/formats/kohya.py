"""kohya's and LyCORIS's files, which ComfyUI, OneTrainer and musubi read: LoRA, LoHa, LoKr, `dora_scale` on either axis.

    <prefix>_<module with underscores>.lora_down.weight (R, I, k…)   .lora_up.weight (O, R, 1…)   .lora_mid.weight (R, R, k…)
    .hada_w1_a (O, R) .hada_w1_b (R, I·∏k) .hada_w2_a .hada_w2_b (.hada_t1, t2)   .lokr_w1 .lokr_w2, or each as _a · _b (.lokr_t2)
    .alpha ()   s = alpha / R, where it is missing s = 1        .dora_scale (O, 1…) `wd_on_output`, or (1, I, 1…), the older kind

From the modules of LyCORIS 3 (`lycoris/modules/locon.py`, `loha.py`, `lokr.py`). Its norm has float32's epsilon added, 1e-7 of m.
The older kind's magnitude of a k × k convolution is per input channel over the whole kernel: the maths here has no such axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError, listed
from . import Format, Stated, Written
from .factors import as_pair, kronecker, one_direction, shaped, with_core
from .magnitudes import vector_of
from .names import FLAT, ModelNames, resolved
from .neutral import NeutralAdapter, NeutralLayer
from .pairs import all_layers, alpha_of
from .source import Source

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class KohyaFormat(Format):
    name = "kohya"
    title = "kohya or LyCORIS"
    file = "adapter.safetensors"
    parts = (
        "lora_down.weight", "lora_up.weight", "lora_mid.weight", *_LOHA, "hada_t1", "hada_t2", *_LOKR, "lokr_t2",
        "alpha", "dora_scale",
    )  # fmt: skip

    def recognizes(self, source: Source) -> bool:
        others = any(key.endswith((".magnitude", ".lora_magnitude_vector")) for key in source.tensors)
        return bool(self.endings(source) & {"lora_down.weight", *_LOHA, *_LOKR}) and not others

    def read(self, source: Source, stated: Stated) -> NeutralAdapter:
        parts = self.parted(source)
        names, component = resolved(list(parts), str(source.path), stated.model, stated.component)
        layers = all_layers(self, source, names, parts, lambda *which: _layer(*which, stated))
        return NeutralAdapter(one_direction(layers), component=component)

    def cannot_say(self, adapter: NeutralAdapter, stated: Stated) -> str | None:
        if adapter.method not in ("lora", "dora", "loha", "dloha", "lokr", "dlokr"):
            return f"method is {adapter.method!r}: kohya's and LyCORIS's files have LoRA, LoHa and LoKr"
        if adapter.also_train or adapter.whole:
            return f"{listed(adapter.also_train or adapter.whole, 4)}: trained whole, which kohya's files have no place for"
        for name, layer in adapter.layers.items():
            if layer.embedding:
                return f"{name} is an embedding, which kohya's files have not"
            if layer.direction != "lora" and stated.model is None:
                return f"{name}: its shapes in a file depend on whether it is a convolution; give the model"
        return None

    def write(self, adapter: NeutralAdapter, stated: Stated) -> Written:
        component = stated.component or adapter.component
        prefix = next((p for p, owner in FLAT.items() if owner == component and p != "lora_te1_"), None)
        if prefix is None:
            raise UserError(f"component is {component!r}; expected one of {listed(sorted({c for c in FLAT.values() if c}))}")
        tensors: dict[str, Tensor] = {}
        for name, layer in shaped(_blocks(adapter.layers, stated.model), stated.model).items():
            clip = (component or "").startswith("text_encoder") and name.startswith("encoder.layers.")
            key = prefix + "text_model_" * clip + name.replace(".", "_")
            if f"{key}.alpha" in tensors:
                raise UserError(f"{name}: another module has the same name with underscores, {key}; kohya's files cannot hold both")
            spelled = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
            kernel = stated.model.kernels.get(name, (1,)) if stated.model else next(iter(layer.factors.values())).shape[1:]
            ones = [1] * (len(kernel) - 1)
            factors, alpha = _whole(layer, ones)
            tensors |= {f"{key}.{spelled.get(part, part)}": t for part, t in factors.items()}
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
            if layer.magnitude is not None:
                m = layer.magnitude.reshape(-1)
                tensors[f"{key}.dora_scale"] = m.view(-1, 1, *ones) if layer.axis == "output" else m.view(1, -1, *ones)
        module = {"lora": "networks.lora"}.get(adapter.method, "lycoris.kohya")
        return Written(tensors, {"ss_network_module": module, "ss_network_dim": str(adapter.config().rank)})


def _blocks(layers: dict[str, NeutralLayer], model: ModelNames | None) -> dict[str, NeutralLayer]:
    """LoKr splits channels there and the matrix's columns here: over a kernel of several positions these differ, so A and B go."""
    wide = {name for name, kernel in (model.kernels if model else {}).items() if torch.Size(kernel[1:]).numel() > 1}
    return {name: as_pair(layer) if layer.direction == "lokr" and name in wide else layer for name, layer in layers.items()}


def _whole(layer: NeutralLayer, ones: list[int]) -> tuple[dict[str, Tensor], float]:
    """(factors, alpha) as LyCORIS builds them: w2 is one matrix where R is half of its larger side or more, and s = 1 then."""
    if layer.direction != "lokr":
        return layer.factors, layer.alpha
    w1, a, b = (layer.factors[part] for part in ("lokr_w1", "lokr_w2_a", "lokr_w2_b"))
    if layer.rank < max(len(a), b.shape[1]) / 2:
        return layer.factors, layer.alpha
    w2 = layer.scaling * (a.float() @ b.float())
    return {"lokr_w1": w1, "lokr_w2": w2.reshape(*w2.shape, *ones)}, 1.0


def _layer(spelled: str, name: str, parts: dict[str, Tensor], stated: Stated) -> NeutralLayer:
    """One module, from its parts."""
    kinds = {kind for kind in ("lora", "hada", "lokr") if any(part.startswith(kind) for part in parts)}
    if len(kinds) != 1:
        raise UserError(f"{spelled} has {listed(sorted(parts))}; expected the factors of one method")
    build = {"lora": _lora, "hada": _loha, "lokr": _lokr}[kinds.pop()]
    factors, rank, shape = build(spelled, parts)
    alpha = alpha_of(spelled, parts, rank, stated.alpha)
    scaling = alpha / rank if rank else 1.0
    scale = parts.get("dora_scale")
    if scale is None:
        return NeutralLayer(factors, scaling)
    kernel = scale.dim() > 2 or (stated.model is not None and name in stated.model.kernels)
    rows, columns = shape
    inputs = _inputs(name, shape, parts, stated)
    m, axis = vector_of(f"{spelled}.dora_scale", scale, (rows, inputs), stated.magnitude_axis)
    if axis == "input" and kernel and inputs != columns:
        raise UserError(
            f"{spelled}.dora_scale has a magnitude per input channel of a convolution over {columns // inputs} positions "
            "(wd_on_output=False), which is no DoRA of its matrix; merge it with LyCORIS, or train with wd_on_output"
        )
    return NeutralLayer(factors, scaling, m, axis)


def _inputs(name: str, shape: tuple[int, int], parts: dict[str, Tensor], stated: Stated) -> int:
    """Input channels of the layer: all columns but those of further positions of a kernel."""
    if stated.model is not None and name in stated.model.kernels:
        return stated.model.kernels[name][0]
    kernels = [t.shape[2:].numel() for part, t in parts.items() if part in ("lora_down.weight", "lora_mid.weight", "lokr_w2")]
    kernels += [t.shape[2:].numel() for part, t in parts.items() if part in ("hada_t1", "lokr_t2")]
    scale = parts["dora_scale"]
    if not kernels and scale.dim() > 2 and scale.shape[0] == 1 and scale.shape[1] > 1:
        return scale.shape[1]  # flattened filters: only this file's own count of channels is known
    return shape[1] // max(kernels, default=1)


def _needed(spelled: str, parts: dict[str, Tensor], *names: str) -> list[Tensor]:
    if missing := [name for name in names if name not in parts]:
        raise UserError(f"{spelled} has no {listed(missing)} beside {listed(sorted(parts))}")
    return [parts[name] for name in names]


def _check_product(spelled: str, left: Tensor, right: Tensor, names: str) -> None:
    if left.shape[1] != len(right):
        raise UserError(f"{spelled}: {names} have shapes {tuple(left.shape)} and {tuple(right.shape)}, whose ranks differ")


Built = tuple[dict[str, Tensor], int, tuple[int, int]]
"""(factors, the rank that alpha is divided by, (O, I))"""


def _lora(spelled: str, parts: dict[str, Tensor]) -> Built:
    down, up = _needed(spelled, parts, "lora_down.weight", "lora_up.weight")
    if (core := parts.get("lora_mid.weight")) is not None:
        down = with_core(core, down)
    _check_product(spelled, up, down, "lora_up and lora_down")
    return {"lora_A": down, "lora_B": up}, len(down), (len(up), down[0].numel())


def _loha(spelled: str, parts: dict[str, Tensor]) -> Built:
    w1_a, w1_b, w2_a, w2_b = _needed(spelled, parts, *_LOHA)
    cores = [name for name in ("hada_t1", "hada_t2") if name in parts]
    if cores:
        t1, t2 = _needed(spelled, parts, "hada_t1", "hada_t2")
        w1_a, w1_b, w2_a, w2_b = w1_a.T, with_core(t1, w1_b).flatten(1), w2_a.T, with_core(t2, w2_b).flatten(1)
    _check_product(spelled, w1_a, w1_b, "hada_w1_a and hada_w1_b")
    _check_product(spelled, w2_a, w2_b, "hada_w2_a and hada_w2_b")
    factors = dict(zip(_LOHA, (w1_a, w1_b, w2_a, w2_b)))
    return {name: t.contiguous() for name, t in factors.items()}, len(w1_b), (len(w1_a), w1_b.shape[1])


def _lokr(spelled: str, parts: dict[str, Tensor]) -> Built:
    rank = 0
    if "lokr_w1" in parts:
        w1 = parts["lokr_w1"]
    else:
        a, b = _needed(spelled, parts, "lokr_w1_a", "lokr_w1_b")
        w1, rank = a.float() @ b.float(), len(b)
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"].flatten(1)
        small = min(w2.shape)
        one = torch.eye(small, dtype=w2.dtype)
        a, b = (one, w2) if len(w2) == small else (w2, one)
    else:
        a, b = _needed(spelled, parts, "lokr_w2_a", "lokr_w2_b")
        if "lokr_t2" in parts:
            a, b = a.T, with_core(parts["lokr_t2"], b).flatten(1)
        _check_product(spelled, a, b, "lokr_w2_a and lokr_w2_b")
        rank = rank or len(b)
    factors = kronecker(w1, a.contiguous(), b.contiguous())
    return factors, rank, (len(w1) * len(a), w1.shape[1] * b.shape[1])  # rank 0, both whole: s = 1, whatever alpha says


FORMATS = (KohyaFormat(),)
