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
from ..math import op
from .calls import rescaled
from .kind import LayerKind, differs


class EmbeddingKind(LayerKind):
    name = "Embedding"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def forward(self, module, base_forward, ids: Tensor):
        a = module.adaptation
        if not torch.compiler.is_compiling():
            a.calls += 1
        (A, B), m = a.factors_of(module), module.magnitude
        padding = module.padding_idx
        out = F.embedding(ids, module.weight, padding)
        dropping = a.dropout > 0 and module.training
        delta = None if A is None else low_rank(module, ids, A, B, out.dtype, padding, dropping)
        if m is not None and a.axis == "output":
            whole = low_rank(module, ids, A, B, out.dtype, padding) if dropping and A is not None else delta
            out = scaled_rows(module, ids, out, delta, whole, m, padding)
        else:
            out = out if delta is None else out + delta
            out = out if m is None else rescaled(module, out, A, B, m, None)
        return out * scale_of(module, out.dtype)

    def axis(self, config) -> str:
        return "output" if config.embedding_magnitude == "token" else "input"

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


def low_rank(module, ids: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, padding: int | None, drop: bool = False) -> Tensor:
    """δ = s·B_t·A (…, I) in `dtype`."""
    with torch.autocast(ids.device.type, enabled=False):
        rows = F.embedding(ids, B, padding).to(dtype) * module.adaptation.scaling
        if drop:
            rows = F.dropout(rows, module.adaptation.dropout)
        return rows @ A.to(dtype)


def scaled_rows(module, ids: Tensor, out: Tensor, delta: Tensor | None, whole: Tensor | None, m: Tensor, padding) -> Tensor:
    """g_t ⊙ (W_t + δ_t) in out's dtype; the gain in fp32 (fp64). whole: δ without dropout, which the norm is of."""
    a = module.adaptation
    dtype = accumulation_dtype(out.dtype)
    if torch.compiler.is_compiling():
        w2, frozen = op.frozen_rows(ids, a.handle.tensor, dtype)
    else:
        w2, frozen = (fact[ids] for fact in a.frozen_facts(module)[:2])
    V = out if delta is None else out + delta
    n2 = w2
    if whole is not None:
        change, wide = whole.to(dtype), out.to(dtype)
        change = change if a.full_gradient else change.detach()
        sum_of_parts = w2 + 2 * (wide * change).sum(-1) + change.square().sum(-1)
        direct = (wide + change).square().sum(-1)
        n2 = torch.where(sum_of_parts < 0.25 * w2, direct, sum_of_parts)  # where the parts cancel
    n2 = torch.where(frozen, 1.0, torch.maximum(n2, 1e-12 * w2))
    n = n2.sqrt()
    gain = torch.where(frozen, 0.0, (F.embedding(ids, m[:, None], padding).squeeze(-1) - n) / n)
    return torch.addcmul(V, V, gain.to(V.dtype)[..., None]) if out.dtype.itemsize >= 4 else (V + V * gain[..., None]).to(V.dtype)
