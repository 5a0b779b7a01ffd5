"""nn.Embedding: W (tokens, dimensions); one magnitude per token (output axis) or per dimension (input axis, PEFT's kind).

    y_t = g_t ⊙ (W_t + s·B_t·A),   n_t² = w_t² + 2·W_t·δ_t + |δ_t|²  with δ_t = s·B_t·A, for the looked-up rows only

The rows are at hand in the forward, so the output axis needs no norm of the whole table and no cache. Scaled embeddings (Gemma 3,
BART: y = scale·W_t) scale the adapted row. The padding row is not trained, as in the base layer.

Cost: 2·T·R·I FLOPs and a few (T, I) passes. The input axis: Bᵀ·W once per change, as in a linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bases import accumulation_dtype
from ..math import compiled
from .kind import LayerKind, differs


class EmbeddingKind(LayerKind):
    name = "Embedding"
    linear = False
    linear_in_x = False
    by_name_only = True
    peft_axis = "input"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def forward(self, layer, ids: Tensor) -> Tensor:
        weight, padding = layer.adapted, layer.padding_idx
        if not torch.compiler.is_compiling():
            weight.calls += 1
        out = F.embedding(ids, layer.weight, padding)
        dropping = weight.dropout > 0 and layer.training
        delta = low_rank(weight, ids, out.dtype, padding, dropping) if weight.rank else None
        if weight.magnitude and weight.axis == "output":
            whole = low_rank(weight, ids, out.dtype, padding) if dropping and weight.rank else delta
            out = scaled_rows(weight, layer, ids, out, delta, whole, padding)
        else:
            out = out if delta is None else out + delta
            out = weight.rescale(out) if weight.magnitude else out
        return out * scale_of(layer, out.dtype)

    def file_tensors(self, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if "lora_A" not in tensors:
            return tensors
        others = {name: t for name, t in tensors.items() if name not in ("lora_A", "lora_B")}
        A, B = tensors["lora_A"], tensors["lora_B"]
        return {"embedding_A": B.T.contiguous(), "embedding_B": A.T.contiguous()} | others

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if "embedding_A" not in tensors:
            return tensors
        return {"lora_A": tensors["embedding_B"].T, "lora_B": tensors["embedding_A"].T}

    def file_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if "lora_A" not in shapes:
            return shapes
        others = {name: size for name, size in shapes.items() if name not in ("lora_A", "lora_B")}
        return {"embedding_A": shapes["lora_B"][::-1], "embedding_B": shapes["lora_A"][::-1]} | others

    def axis(self, config) -> str:
        return "output" if config.embedding_magnitude == "token" else "input"

    def prepares(self, weight) -> bool:
        return weight.axis == "input"

    def refusal(self, module: nn.Module) -> str | None:
        if module.max_norm is not None:
            return "max_norm rewrites its weight in every forward"
        if module.scale_grad_by_freq or module.sparse:
            return "sparse or frequency-scaled gradients are not supported"
        return super().refusal(module)

    def probe(self, module: nn.Module) -> str | None:
        if type(module).forward is nn.Embedding.forward or module.weight.is_meta:
            return None
        ids = torch.arange(min(3, module.num_embeddings), device=module.weight.device)
        return differs(module, (ids,), module.weight[ids] * scale_of(module, module.weight.dtype), "a row of its weight")


def scale_of(module, dtype: torch.dtype):
    """What the class multiplies its rows with: `embed_scale` in transformers."""
    scale = getattr(module, "embed_scale", 1.0)
    return scale.to(dtype) if isinstance(scale, Tensor) else scale


def low_rank(weight, ids: Tensor, dtype: torch.dtype, padding: int | None, drop: bool = False) -> Tensor:
    """δ = s·B_t·A (…, I) in `dtype`."""
    A, B = weight.low_rank()
    with torch.autocast(ids.device.type, enabled=False):
        rows = F.embedding(ids, B, padding).to(dtype) * weight.s
        if drop:
            rows = F.dropout(rows, weight.dropout)
        return rows @ A.to(dtype)


def scaled_rows(weight, layer, ids: Tensor, out: Tensor, delta: Tensor | None, whole: Tensor | None, padding) -> Tensor:
    """g_t ⊙ (W_t + δ_t) in out's dtype; g in fp32 (fp64). whole: δ without dropout, which the norm is of."""
    dtype = accumulation_dtype(out.dtype)
    if torch.compiler.is_compiling():
        w2, frozen = compiled.frozen_rows(ids, layer.weight, weight.handle.tensor, dtype)
    else:
        w2, frozen = (fact[ids] for fact in weight.facts[:2])
    V = out if delta is None else out + delta
    n2 = w2
    if whole is not None:
        change, wide = whole.to(dtype), out.to(dtype)
        change = change if weight.full_gradient else change.detach()
        sum_of_parts = w2 + 2 * (wide * change).sum(-1) + change.square().sum(-1)
        direct = (wide + change).square().sum(-1)
        n2 = torch.where(sum_of_parts < 0.25 * w2, direct, sum_of_parts)  # where the parts cancel
    n2 = torch.where(frozen, 1.0, torch.maximum(n2, 1e-12 * w2))
    n = n2.sqrt()
    g_minus_1 = torch.where(frozen, 0.0, (F.embedding(ids, weight.m()[:, None], padding).squeeze(-1) - n) / n)
    if out.dtype.itemsize >= 4:
        return torch.addcmul(V, V, g_minus_1.to(V.dtype)[..., None])
    return (V + V * g_minus_1[..., None]).to(V.dtype)
