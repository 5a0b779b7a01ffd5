"""The grid {layer kind} × {base} × {direction} × {axis}: every combination as a tiny real layer, with its dense reference.

Run as a program it writes docs/support.md: what is supported, and the reason for each refusal, as `attach` gives it.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reference
import torch
from expectations import section
from refusals import REFUSALS, message
from torch import nn
from torch.nn import functional as F

import doratune
from doratune.errors import UserError

METHODS = ("lora", "dora", "vera", "dvora", "loha", "dloha", "lokr", "dlokr", "magnitude only", "dora, start pissa")
RANK, SCALING = 3, 1.5


def as_rows(W):
    return W.flatten(1)


@dataclass
class Case:
    """A layer under the name "layer" of `model`, an input of it, and how its output follows from a weight."""

    model: nn.Module
    x: Any
    apply: Any  # (layer, W in the layer's shape, bias, x) -> y
    to_matrix: Any = as_rows

    @property
    def layer(self):
        return self.model.layer


def _model(layer: nn.Module) -> nn.Module:
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model


def _conv(cls, *args, x, **kwargs):
    return lambda: Case(
        _model(cls(*args, **kwargs)),
        torch.randn(x),
        lambda layer, W, bias, x: layer._conv_forward(x, W, bias),
    )


def _linear():
    return Case(_model(nn.Linear(12, 18)), torch.randn(2, 7, 12), lambda layer, W, bias, x: F.linear(x, W, bias))


def _transposed():
    from transformers.pytorch_utils import Conv1D

    case = Case(_model(Conv1D(18, 12)), torch.randn(2, 7, 12), lambda layer, W, bias, x: x @ W + bias, lambda W: W.T)
    nn.init.normal_(case.layer.bias)
    return case


def _embedding(scale=None):
    def build():
        layer = nn.Embedding(30, 12, padding_idx=0)
        if scale:
            from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

            layer = Gemma3TextScaledWordEmbedding(30, 12, 0, embed_scale=scale)
            nn.init.normal_(layer.weight)
        return Case(_model(layer), torch.randint(1, 30, (3, 5)), lambda layer, W, bias, x: F.embedding(x, W) * (scale or 1.0))

    return build


KINDS = {
    "Linear": _linear,
    "Conv1D (transformers)": _transposed,
    "Conv1d": _conv(nn.Conv1d, 6, 8, 3, padding="same", x=(2, 6, 11)),
    "Conv2d": _conv(nn.Conv2d, 6, 8, (3, 2), stride=2, padding=1, dilation=(1, 2), x=(2, 6, 9, 8)),
    "Conv2d, reflecting": _conv(nn.Conv2d, 6, 8, 3, padding=1, padding_mode="reflect", bias=False, x=(2, 6, 5, 6)),
    "Conv2d, 2 groups": _conv(nn.Conv2d, 6, 8, 3, groups=2, padding=1, x=(2, 6, 5, 6)),
    "Conv2d, depthwise": _conv(nn.Conv2d, 6, 12, 3, groups=6, x=(2, 6, 5, 6)),
    "Conv2d, 1 × 1": _conv(nn.Conv2d, 6, 8, 1, x=(2, 6, 5, 6)),
    "Conv3d": _conv(nn.Conv3d, 4, 6, 2, padding=1, x=(1, 4, 3, 4, 5)),
    "Embedding": _embedding(),
    "Embedding, scaled": _embedding(7.0),
}
AXES = ("output", "input")


def config(method: str, axis: str, full: bool = False, **more) -> doratune.AdapterConfig:
    """The configuration of one cell."""
    base, _, start = method.partition(", start ")
    settings: dict = {"rank": RANK, "alpha": RANK * SCALING, "targets": ["layer"], "magnitude_axis": axis}
    settings |= {"method": base, "norm_gradient": "full" if full else "detached"}
    settings |= {"embedding_magnitude": "token" if axis == "output" else "dimension"}
    if start:
        settings |= {"start": start}
    if method == "magnitude only":
        settings |= {"method": "dora", "targets": [], "magnitude_only": ["layer"]}
    return doratune.AdapterConfig(**settings | more)


def cell(kind: str, method: str, axis: str, dtype=torch.float32, full=False, seed=0) -> tuple[Case, torch.Tensor]:
    """(an adapted layer at its start, its weight as a matrix in float64)."""
    torch.manual_seed(seed)
    case = KINDS[kind]()
    case.model.to(dtype)
    if case.x.is_floating_point():
        case.x = case.x.to(dtype)
    W = case.to_matrix(case.layer.weight.detach().double())
    doratune.attach(case.model, config(method, axis, full))
    return case, W


def move(layer, seed=1) -> dict[str, torch.Tensor]:
    """Move a layer away from its start; returns its trained parameters by name."""
    generator = torch.Generator().manual_seed(seed)
    own = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    with torch.no_grad():
        for name, p in own.items():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.mul_(1 + 0.2 * noise.abs()) if name == "magnitude" else p.add_(0.3 * noise)
    return own


def delta(layer, p: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """ΔV/s as a dense matrix, from the formulas of the papers."""
    if "vera_b" in p:
        A, B = layer.adapted.direction.shared.get(torch.device("cpu"), p["vera_b"].dtype)
        A, B = A[:, : layer.adapted.base.shape(layer)[1]], B[: len(p["vera_b"])]
        return torch.diag(p["vera_b"]) @ B @ torch.diag(p["vera_d"]) @ A
    if "hada_w1_a" in p:
        return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    if "lokr_w1" in p:
        return torch.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"])
    if "lora_A" not in p:
        return None
    start = (layer.start_B.detach() @ layer.start_A.detach()).to(p["lora_B"].dtype) if hasattr(layer, "start_A") else 0.0
    return p["lora_B"] @ p["lora_A"] - start


def dense(case: Case, W, own: dict[str, torch.Tensor], s: float, axis: str, full: bool, dtype, dY):
    """(y, {parameter: gradient}) of the dense definition in `dtype`; W (O, I) in float64."""
    layer = case.layer
    leaves = {name: p.detach().to(dtype).requires_grad_() for name, p in own.items()}
    x = case.x.to(dtype).requires_grad_() if case.x.is_floating_point() else case.x
    change = delta(layer, leaves)
    eye = torch.eye(W.shape[0], dtype=dtype)
    merged = reference.merged(W.to(dtype), change, None if change is None else eye, leaves.get("magnitude"), s, axis, full)
    stored = merged.T if case.to_matrix(layer.weight).shape != layer.weight.flatten(1).shape else merged.view(layer.weight.shape)
    bias = getattr(layer, "bias", None)
    y = case.apply(layer, stored, None if bias is None else bias.detach().to(dtype), x)
    y.backward(dY.to(dtype))
    gradients = {name: t.grad for name, t in leaves.items()}
    return y.detach(), gradients | ({"x": x.grad} if x.is_floating_point() else {})


def cells():
    """Every combination; the axis is the magnitude's, so methods without one come once."""
    return (key for key in itertools.product(KINDS, METHODS, AXES) if key[2] == "output" or config(key[1], key[2]).has_magnitude)


def outcome(kind: str, method: str, axis: str) -> str | None:
    """None if the combination is supported, else the reason as the user reads it."""
    try:
        cell(kind, method, axis)
    except UserError as error:
        return str(error).split(": ", 2)[-1]
    return None


def storages() -> list[str]:
    """The second table of docs/support.md: a linear layer's weight in each storage, as attaching to a real one finds it."""
    import storages

    lines = [
        "## Storages of a linear layer's weight",
        "",
        "| storage | lora | dora | dvora | magnitude only | norm from | dx from | back |",
    ]
    lines.append("|---" * 8 + "|")
    for name in storages.BASES:
        marks = []
        for method in ("lora", "dora", "dvora", "magnitude only"):
            for axis in AXES if config(method, "output").has_magnitude else AXES[:1]:
                stored = storages.build(name)
                doratune.attach(stored.model, config(method, axis))
            marks.append("yes")
        base, layer = stored.layer.adapted.base, stored.layer
        marks += ["its forward" if base.exact_forward else "row tiles", "its backward" if base.has_gradient else "row tiles"]
        marks.append("no" if base.requantize_refusal(layer) else "yes")
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    return [
        *lines,
        "",
        "`tests/bases/test_bases.py` checks each on both axes, forward, gradients, merging and zero rows, against the dequantized",
        "weight. *Norm from*: where its product U comes from; *dx from*: who gives the input's gradient; *back*: does",
        '`merge(quantized="same")` know how.',
        "`doratune.bases.register` adds a storage.",
        "",
    ]


def page() -> str:
    """docs/support.md."""
    lines = [
        "# What is supported",
        "",
        "Generated by `python tests/grid.py` from what `attach` says; `tests/adapter/test_grid.py` checks forward, gradients,",
        "merging, the exact start and zero rows of every supported cell against a dense float64 reference, in fp32 and bf16.",
        "",
    ]
    reasons: dict[str, int] = {}
    for axis in AXES:
        methods = [method for method in METHODS if (next(iter(KINDS)), method, axis) in set(cells())]
        lines += [
            f"## Magnitude on the {axis} axis",
            "",
            "| layer | " + " | ".join(methods) + " |",
            "|---" * (len(methods) + 1) + "|",
        ]
        for kind in KINDS:
            marks = []
            for method in methods:
                reason = outcome(kind, method, axis)
                marks.append("yes" if reason is None else f"no ({reasons.setdefault(reason, len(reasons) + 1)})")
            lines.append(f"| {kind} | " + " | ".join(marks) + " |")
        lines.append("")
    lines += storages()
    lines += ["Refused, with the reason that the error gives:", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    lines += ["", "## What users do that is refused", "", "Each is a real call (`tests/refusals.py`), with what it says.", ""]
    lines += ["| | situation | message |", "|---|---|---|"]
    lines += [f"| {kind} | {situation} | {message(call).replace('|', chr(92) + '|')} |" for kind, situation, call in REFUSALS]
    lines += section()
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).resolve().parents[1].joinpath("docs", "support.md").write_text(page(), encoding="utf-8")
