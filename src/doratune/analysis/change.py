"""ΔM and ΔD of a weight against the pretrained one (§3.2): the mean over its vectors of

    ΔM = |m_t − m_0|                (Eq. 3)         m_t, m_0 the vectors' norms
    ΔD = 1 − cos(V_t, W_0)          (Eq. 4)

per output row (or input column). A small turn is lost in the cosine itself, which is 1 to seven digits; so 1 − cos comes from the
part of the change that stands across W_0: with e = V_t − W_0, e⊥ = e − (e·W_0/w²)·W_0,

    sin² = |e⊥|²/n²,    1 − cos = sin²/(1 + cos)

For an adapter e = s·B·A is never formed: W·e = s·rowsum(U ⊙ B), |e|² = s²·rowsum((B·G) ⊙ B) with U = W·Aᵀ and G = A·Aᵀ, in float64
from row tiles of W. What is trained is m: ΔM of DoRA is |m − w|, of LoRA |n − w| = |2·W·e + |e|²|/(n + w). m starts at w rounded to
its own precision; where it is still there, ΔM is exactly 0.

Rows (columns) without direction are left out of both means. Cost: one pass over both weights, or O·I·R products in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter.attach import adapters
from ..bases import TILE_NUMBERS
from ..errors import UserError
from ..layers import kind_of
from ..math.decomposition import directionless


@dataclass(frozen=True)
class Change:
    """ΔM and ΔD of one weight, and the numbers behind them: one for each row (column) with a direction.

    `relative_magnitudes` are |m_t − m_0|/m_0."""

    magnitudes: Tensor
    directions: Tensor
    relative_magnitudes: Tensor

    @property
    def magnitude(self) -> float:
        """ΔM (Eq. 3)."""
        return self.magnitudes.mean().item() if self.magnitudes.numel() else 0.0

    @property
    def direction(self) -> float:
        """ΔD (Eq. 4)."""
        return self.directions.mean().item() if self.directions.numel() else 0.0

    @property
    def relative(self) -> float:
        """Mean of |m_t − m_0|/m_0: how far m itself moved (of LoRA and dense weights: the norm)."""
        return self.relative_magnitudes.mean().item() if self.relative_magnitudes.numel() else 0.0


@torch.no_grad()
def weight_change(before: Tensor, after: Tensor, magnitude_axis: str = "output") -> Change:
    """ΔM and ΔD between two dense weights (O, I), or of any shape with O first (convolutions).

    Args:
        magnitude_axis: "output": one magnitude per row; "input": per column.

    Raises:
        UserError: different shapes, an unknown axis, values that are not finite.
    """
    if before.shape != after.shape or before.dim() < 2:
        raise UserError(f"the weights have shapes {tuple(before.shape)} and {tuple(after.shape)}; expected two of one shape (O, I)")
    if magnitude_axis not in ("output", "input"):
        raise UserError(f"magnitude_axis is {magnitude_axis!r}; expected output or input")
    if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
        raise UserError("a weight holds NaN or infinite values; there is no change to measure")
    before, after = before.flatten(1), after.flatten(1)
    if magnitude_axis == "input":
        before, after = before.T, after.T
    parts = [_rows(b.double(), a.double()) for b, a in tiles(before, after)]
    w, dm, turn = (torch.cat(column) for column in zip(*parts, strict=True)) if parts else (torch.empty(0),) * 3
    return _with_direction(w, dm, turn, directionless(w))


def tiles(before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of two matrices of one shape, a few megabytes at a time."""
    step = max(1, TILE_NUMBERS // max(1, before.shape[1]))
    yield from zip(before.split(step), after.split(step), strict=True)


def _rows(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of a tile: (w, n − w, 1 − cos)."""
    e = V - W
    w2, along, e2 = W.square().sum(1), (W * e).sum(1), e.square().sum(1)
    share = along / w2.clamp_min(1e-300)
    across2 = (e - share[:, None] * W).square().sum(1)
    return w2.sqrt(), norm_change(w2, along, e2), one_minus_cosine(w2, along, V.square().sum(1), across2)


def norm_change(w2: Tensor, along: Tensor, e2: Tensor) -> Tensor:
    """n − w from n² − w² = 2·W·e + |e|², without their difference."""
    n2 = (w2 + 2 * along + e2).clamp_min(0)
    return (2 * along + e2) / (n2.sqrt() + w2.sqrt()).clamp_min(1e-300)


def one_minus_cosine(w2: Tensor, along: Tensor, n2: Tensor, across2: Tensor) -> Tensor:
    """1 − cos(W + e, W) from |e⊥|²; exactly 0 where e lies along W."""
    cosine = (w2 + along) / (w2 * n2).sqrt().clamp_min(1e-300)
    sine2 = (across2 / n2.clamp_min(1e-300)).clamp(0, 1)
    return torch.where(cosine > 0, sine2 / (1 + cosine), 1 - cosine.clamp(-1, 1))


def _with_direction(w: Tensor, dm: Tensor, turn: Tensor, frozen: Tensor) -> Change:
    """The change of the vectors that have a direction."""
    w, dm, turn = w[~frozen], dm[~frozen].abs(), turn[~frozen]
    return Change(dm, turn, dm / w)


@torch.no_grad()
def layer_change(layer) -> Change:
    """ΔM and ΔD of one adapted layer, or of an adapted weight (one expert), from its factors."""
    weight = getattr(layer, "adapted", layer)
    facts = weight.facts
    w2, along, e2 = _factored(weight, *weight.low_rank())
    n2 = (w2 + 2 * along + e2).clamp_min(0)
    across2 = (e2 - along.square() / w2.clamp_min(1e-300)).clamp_min(0)
    m = weight.m()
    if m is None:
        dm = norm_change(w2, along, e2)
    else:
        unmoved = m == facts.w2.sqrt().to(m)
        dm = torch.where(unmoved.to(w2.device), 0, m.to(w2) - w2.sqrt())
    return _with_direction(w2.sqrt(), dm, one_minus_cosine(w2, along, n2, across2), facts.directionless.to(w2.device))


def _factored(weight, A: Tensor | None, B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(w², W·e, |e|²) per row (column) in float64, e = s·B·A never formed."""
    rows, columns = weight.shape
    per_row, s, device = weight.axis == "output", weight.scaling, weight.device
    w2 = torch.zeros(rows if per_row else columns, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    along = torch.zeros_like(w2)  # Apple's GPUs have no float64
    A, B = (w2.new_zeros(0, columns), w2.new_zeros(rows, 0)) if A is None else (A.to(w2), B.to(w2))
    for which, tile in weight.row_tiles():
        W = tile.to(w2)
        if per_row:
            w2[which], along[which] = W.square().sum(1), s * ((W @ A.T) * B[which]).sum(1)
        else:
            w2 += W.square().sum(0)
            along += s * ((B[which].T @ W) * A).sum(0)
    small, large = (A @ A.T, B) if per_row else (B.T @ B, A.T)
    return w2, along, s**2 * ((large @ small) * large).sum(1).clamp_min(0)


def named_parts(model: nn.Module) -> Iterator[tuple[str, object]]:
    """(name, weight with one matrix) of an attached model: its adapted layers, and the single experts of batched ones."""
    for name, layer in adapters(model):
        parts = layer.adapted.matrices()
        yield from ((name if len(parts) == 1 else f"{name}.{i}", part) for i, part in enumerate(parts))


def adapter_changes(model: nn.Module) -> dict[str, Change]:
    """{layer: ΔM and ΔD} of every adapted layer of an attached model, against its frozen weights."""
    return {name: layer_change(part) for name, part in named_parts(model)}


def matrix_of(model: nn.Module, name: str) -> Tensor:
    """The dense weight of a module, as the maths sees it: (O, I), whichever way round it is stored.

    Raises:
        AttributeError: no such module, or one without a weight.
    """
    module = model.get_submodule(name)
    kind = kind_of(module)
    return (module.weight if kind is None else kind.matrix(module.weight)).detach().flatten(1)


def model_changes(before: nn.Module, after: nn.Module, names, magnitude_axis: str = "output") -> dict[str, Change]:
    """{layer: ΔM and ΔD} between the dense weights of two models with the same modules (full fine-tuning, merged models).

    Args:
        names: the modules to compare.

    Raises:
        UserError: a module that one of them lacks, or shapes that differ (all of them in one message).
    """
    changes, problems = {}, []
    for name in names:
        try:
            changes[name] = weight_change(matrix_of(before, name), matrix_of(after, name), magnitude_axis)
        except (AttributeError, UserError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserError("; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else ""))
    return changes
