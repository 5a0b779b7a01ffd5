"""nn.MultiheadAttention: the packed projection W = [W_q; W_k; W_v] (3E, E) as one DoRA layer; `out_proj` is one of its own.

    [q; k; v] = out + (g − 1) ⊙ (out − bias) + (x·Aᵀ)·(s·g ⊙ B)ᵀ        A (R, E), B (3E, R), m (3E,)       (Eq. 5)

In cross-attention q, k and v read their rows of W, B and m. On the output axis that is the same as three linear layers that share
A; on the input axis the norm of a column runs over all three.

The calls are those of `torch.nn.functional.multi_head_attention_forward`, with two changes: the projection is the adapted one,
and `out_proj` is really called. So an untrained adapter gives the numbers of the frozen base bit for bit (not those of the fused
function that PyTorch takes in evaluation; see `fastpath.py`).

Cost: as a linear layer's; ΔW is never formed. Under torch.compile self-attention is part of the graph, cross-attention breaks it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kind import LayerKind, outside_compile
from .weight import compute_dtype


class AttentionKind(LayerKind):
    name = "Attention"
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"
    linear = False
    batch_first = False

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    def output_columns(self, weight, x: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([x.to(tile.dtype) @ tile.T for _, tile in weight.row_tiles(rows)], 1)

    def refusal(self, module: nn.Module) -> str | None:
        if module.in_proj_weight is None:
            return "kdim or vdim differ from embed_dim: it has separate weights for q, k and v, not one packed weight"
        if module.bias_k is not None or module.bias_v is not None:
            return "add_bias_kv appends learned keys and values, which the adapted forward does not"
        if module.add_zero_attn:
            return "add_zero_attn appends a key and value of zeros, which the adapted forward does not"
        plain = getattr(type(module), "plain_class", type(module))
        if plain.forward is not nn.MultiheadAttention.forward:
            return f"{plain.__name__} has a forward of its own"
        return super().refusal(module)

    def forward(
        self,
        module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's, but for nested tensors, which it takes in its fused function only."""
        assert not (query.is_nested or key.is_nested or value.is_nested), "an adapted MultiheadAttention takes no nested tensors"
        F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, module.num_heads)
        batched = query.dim() == 3
        same = batched and query is key, batched and key is value  # PyTorch loses sight of it in unbatched input
        bring = (lambda x: x.transpose(1, 0)) if module.batch_first else (lambda x: x)
        q = bring(query) if batched else query.unsqueeze(1)
        k = q if same[0] else bring(key) if batched else key.unsqueeze(1)
        v = k if same[1] else bring(value) if batched else value.unsqueeze(1)
        if k.shape != v.shape:
            raise AssertionError(f"key shape {k.shape} does not match value shape {v.shape}")
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        heads = Heads(len(q), q.shape[1], module.num_heads, len(k))
        mask, is_causal = merged_mask(heads, q.dtype, key_padding_mask, attn_mask, is_causal, need_weights)
        q, k, v = (heads.split(t) for t in projected(module, q, k, v, same))
        dropout = module.dropout if module.training else 0.0
        attend = weighted if need_weights else fused
        out, weights = attend(heads, q, k, v, mask, dropout, is_causal)
        out = module.out_proj(out).view(heads.targets, heads.batch, -1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return bring(out), weights


class Heads(NamedTuple):
    """Sizes: L targets, N in the batch, H heads, S sources."""

    targets: int
    batch: int
    heads: int
    sources: int

    def split(self, x_LNE: Tensor) -> Tensor:
        """(N·H, L, E/H)."""
        return x_LNE.view(len(x_LNE), self.batch * self.heads, -1).transpose(0, 1)


def projected(module, q: Tensor, k: Tensor, v: Tensor, same: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (·, N, E) after their projections; same: (is q the same as k?, k as v?), which are then projected at once."""
    E = q.shape[-1]
    if not torch.compiler.is_compiling():
        module.adapted.calls += 1
    if all(same):
        return _unpacked(project(module, q, slice(0, 3 * E)), 3)
    return _crossed(module, q, k, v, same[1])


@outside_compile
def _crossed(module, q: Tensor, k: Tensor, v: Tensor, same: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`projected` in cross-attention; same: is k the same as v?"""
    E = q.shape[-1]
    if same:
        return project(module, q, slice(0, E)), *_unpacked(project(module, k, slice(E, 3 * E)), 2)
    return tuple(project(module, x, slice(i * E, (i + 1) * E)) for i, x in enumerate((q, k, v)))


def project(module, x: Tensor, rows: slice) -> Tensor:
    """x·W'ᵀ + bias for these rows of the packed weight."""
    weight, W, bias = module.adapted, module.in_proj_weight, module.in_proj_bias
    if weight.magnitude and weight.axis == "input":
        x = weight.scaled_input(x, compute_dtype(x))
    which = None if rows == slice(0, len(W)) else rows
    if which is not None:
        W, bias = W[rows], None if bias is None else bias[rows]
    out = F.linear(x, W, bias)
    return out if not weight.rank and weight.axis == "input" else weight.compose(x, out, bias, which=which)


def _unpacked(y: Tensor, parts: int) -> tuple[Tensor, ...]:
    """(L, N, parts·E) as `parts` contiguous (L, N, E), in the memory layout of PyTorch's own."""
    y = y.unflatten(-1, (parts, y.shape[-1] // parts)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return tuple(y[i] for i in range(parts))


def merged_mask(heads: Heads, dtype: torch.dtype, padding: Tensor | None, mask: Tensor | None, is_causal: bool, need_weights: bool):
    """(both masks as one that is added, (1 or N·H, L or 1, S) or None; is it still a causal one that needs no mask?)."""
    padding = F._canonical_mask(padding, "key_padding_mask", F._none_or_dtype(mask), "attn_mask", dtype)
    if is_causal and mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint; see Transformer.generate_square_subsequent_mask")
    if is_causal and padding is None and not need_weights:
        return None, True
    mask = F._canonical_mask(mask, "attn_mask", None, "", dtype, check_other=False)
    L, N, H, S = heads
    if mask is not None:
        expected = (L, S) if mask.dim() == 2 else (N * H, L, S)
        if mask.shape != expected:
            raise RuntimeError(f"The shape of the {mask.dim()}D attn_mask is {mask.shape}, but should be {expected}.")
        mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
    if padding is None:
        return mask, is_causal
    if padding.shape != (N, S):
        raise AssertionError(f"Expected key_padded_mask.shape to be {(N, S)}, but got {tuple(padding.shape)}")
    padding = padding.view(N, 1, 1, S).expand(-1, H, -1, -1).reshape(N * H, 1, S)
    return padding if mask is None else mask + padding, False


def weighted(heads: Heads, q: Tensor, k: Tensor, v: Tensor, mask, dropout: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """(attention's output (L·N, E), its weights (N, H, L, S))."""
    q, k = q * math.sqrt(1.0 / float(q.shape[-1])), k.transpose(-2, -1)
    weights = torch.bmm(q, k) if mask is None else torch.baddbmm(mask, q, k)
    weights = F.softmax(weights, dim=-1)
    weights = F.dropout(weights, p=dropout) if dropout > 0.0 else weights
    out = torch.bmm(weights, v).transpose(0, 1).reshape(heads.targets * heads.batch, -1)
    return out, weights.view(heads.batch, heads.heads, heads.targets, heads.sources)


def fused(heads: Heads, q: Tensor, k: Tensor, v: Tensor, mask, dropout: float, is_causal: bool) -> tuple[Tensor, None]:
    """(attention's output (N·L, E), None) by scaled_dot_product_attention."""
    L, N, H, S = heads
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.view(N, H, -1, S)
    q, k, v = q.view(N, H, L, -1), k.view(N, H, S, -1), v.view(N, H, S, -1)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    return out.permute(2, 0, 1, 3).reshape(N * L, -1), None
