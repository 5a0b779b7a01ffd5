"""Row norms of a base, by which an adapter knows the base that it was trained on.

    |W_o| of at most 512 rows in each of at most 8 adapted modules spread over the model: 16 means of neighbouring rows,
    of W as it is and of W rounded to bf16

Two bases pass for one where all means of all modules agree, relative to the larger of group and module, to

    1e-5                                  the same numbers; one of the bases in bf16: both rounded to it
    2⁻¹² (+ 2⁻⁹) + 1e-5                   W in fp16 against fp32 (against bf16): numbers that move by ε move no norm by more
    0.06 + 0.9/√(I · rows of a group)     a quantized base: an error e, 0.1 of W at 4 bits and 0.3 at 3, moves a norm by e²/2, and
                                          by e/√I more in a direction of its own for each row

so that another dtype and a quantized base (from 3 bits) pass. Between dense bases a few steps of training show; a quantized one is
told from another model only, not from a fine-tuned sibling.

Cost: at most 4,096 rows read and their squares summed in fp64 on the CPU, tile by tile; about 4 kB of JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bases import Base, accumulation_dtype
from ..bases.dense import DenseBase
from ..errors import UserError
from ..layers import stored_in
from ..layers.parts import Expert
from ..layers.shares import as_sum, is_share, own_place
from ..math.autograd import no_autocast

MODULES, GROUPS, ROWS = 8, 16, 32
"""At most so many modules, means in each, rows in a mean."""
QUANTIZED = "quantized"
EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-12, "bfloat16": 2.0**-9}
"""By how much of itself a number moves that is rounded to this dtype."""
SAME, SUBNORMAL = 1e-5, 2.0**-25
"""Sums in another order; the smallest step of fp16, below which it resolves nothing."""


@dataclass(frozen=True)
class RowNorms:
    """One module's means; `precision`: the coarsest dtype that holds its numbers, or quantized."""

    precision: str
    columns: int
    rows: int
    norms: tuple[float, ...]
    rounded: tuple[float, ...]

    def to_dict(self) -> dict:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, name: str, values) -> RowNorms:
        """Raises UserError for what `to_dict` does not write."""
        try:
            means = {key: tuple(float(v) for v in values[key]) for key in ("norms", "rounded")}
            norms = cls(str(values["precision"]), int(values["columns"]), int(values["rows"]), **means)
        except (TypeError, ValueError, KeyError):
            norms = None
        if norms is None or norms.precision not in (*EPSILON, QUANTIZED) or len(norms.norms) != len(norms.rounded):
            raise UserError(f"base_norms: {name} is {values!r:.80}; expected precision, columns, rows, norms and rounded")
        return norms

    def compared(self, other: RowNorms) -> tuple[str, float]:
        """(which means tell, how far those of one base may be apart)."""
        precisions = {self.precision, other.precision}
        if QUANTIZED in precisions:
            return "norms", 0.06 + 0.9 / max(1, self.columns * min(self.rows, other.rows)) ** 0.5
        if "bfloat16" in precisions and "float16" not in precisions:
            return "rounded", SAME
        return "norms", SAME + (sum(EPSILON[p] for p in precisions) if len(precisions) > 1 else 0.0)

    def furthest(self, other: RowNorms) -> tuple[float, float, float]:
        """(relative difference, mine, the other's) of the means that are furthest apart."""
        which, _ = self.compared(other)
        mine, theirs = (torch.tensor(getattr(n, which), dtype=torch.float64) for n in (self, other))
        if mine.shape != theirs.shape:
            return float("inf"), mine.mean().item(), theirs.mean().item()
        scale = torch.maximum(mine, theirs).clamp_min(max(mine.mean().item(), 1e-30))
        apart = ((mine - theirs).abs() - SUBNORMAL * self.columns**0.5).clamp_min(0) / scale
        group = int(apart.argmax())
        return apart[group].item(), mine[group].item(), theirs[group].item()


def spread(count: int, most: int = MODULES) -> set[int]:
    """At most so many places among `count`, the first and the last among them."""
    return {round(i * (count - 1) / (most - 1)) for i in range(most)} if count > most else set(range(count))


def sampled_rows(count: int) -> list[Tensor]:
    """Indices of the rows behind each mean."""
    groups = torch.arange(count).tensor_split(min(GROUPS, count))
    return [group[:: -(-len(group) // ROWS)] for group in groups]


@torch.no_grad()
def row_norms(base: Base, module: nn.Module) -> RowNorms | OwnRows | None:
    """The means of one module; of batched experts those of the first. None: no numbers there (a meta device, NaN). Of a share what
    this process has of them; nothing is sent before they are `known`."""
    if is_share(W := getattr(module, base.kind.weight_name, None)):
        return _own_rows(base.kind, W.detach()) if base.writable else None
    if base.kind.stacked:
        base, module = DenseBase(base.kind.expert_kind), Expert(module, 0)
    (count, columns), device = base.shape(module), base.device(module)
    if device.type == "meta" or not count:
        return None
    groups, tiles = sampled_rows(count), []
    with torch.inference_mode(False), no_autocast(device):
        for _, tile in base.row_tiles(module, torch.cat(groups).to(device)):
            tiles.append(_measured(tile.detach().cpu()))
    norms, rounded, fitting = zip(*tiles, strict=True)
    held = set.intersection(*fitting) if base.writable else set()
    return _row_norms(torch.cat(norms), torch.cat(rounded), held, columns, groups)


def _row_norms(norms: Tensor, rounded: Tensor, held: set[str], columns: int, groups: list[Tensor]) -> RowNorms | None:
    """From the norms of the sampled rows; held: dtypes that hold all of their numbers."""
    means = [_means(each, groups) for each in (norms, rounded)]
    if not all(value < float("inf") for each in means for value in each):
        return None
    precision = next((p for p in reversed(EPSILON) if p in held), QUANTIZED)
    return RowNorms(precision, columns, max(map(len, groups)), *means)


@dataclass
class OwnRows:
    """What this process has of a share's: `sums`, which all processes' add up to the squared norms of the sampled rows, those of W
    rounded to bf16, and for each dtype how many rows it does not hold."""

    sums: Tensor
    columns: int
    groups: list[Tensor]

    def gathered(self) -> RowNorms | None:
        """Every process asks: some thousand numbers are sent."""
        values, count = self.sums.full_tensor().cpu(), sum(map(len, self.groups))
        squares, rounded, lost = values.split([count, count, len(EPSILON)])
        held = {p for p, rows in zip(EPSILON, lost.tolist(), strict=True) if not rows}
        return _row_norms(squares.sqrt(), rounded.sqrt(), held, self.columns, self.groups)


def known(norms: RowNorms | OwnRows | None) -> RowNorms | None:
    """The means, of a share from all processes, each of which asks."""
    return norms.gathered() if isinstance(norms, OwnRows) else norms


def _own_rows(kind, W: Tensor) -> OwnRows | None:
    """Of a share that is split once, by rows, by columns or by experts."""
    if (place := own_place(W)) is None:
        return None
    (along, start), local, shape = place, W.to_local(), W.shape
    here = True  # is any of it in this process?
    if kind.stacked:
        here = len(local) > 0 and (along > 0 or start == 0)
        local, shape, along = local[0] if here else None, shape[1:], along - 1
        kind = kind.expert_kind
    count, columns = kind.matrix(torch.empty(shape, device="meta")).shape
    groups = sampled_rows(count)
    doubled = [size * (1 + (dim == along)) for dim, size in enumerate(shape)]
    by_rows = along >= 0 and kind.matrix(torch.empty(doubled, device="meta")).shape[0] != count
    squares, lost, done = torch.zeros(2, sum(map(len, groups)), dtype=torch.float64), torch.zeros(len(EPSILON)), 0
    for group in groups:
        own = group - start * by_rows
        own = own[(own >= 0) & (own < kind.matrix(local).shape[0])] if here else own[:0]
        if len(own):
            tile = kind.rows(local, own.to(local.device)).cpu()
            norms, rounded, held = _measured(tile.to(accumulation_dtype(tile.dtype)))
            places = done + torch.isin(group - start * by_rows, own).nonzero().squeeze(1)
            squares[0, places], squares[1, places] = norms.square(), rounded.square()
            lost += torch.tensor([p not in held for p in EPSILON])
        done += len(group)
    return OwnRows(as_sum(torch.cat([squares.flatten(), lost.double()]), W), columns, groups)


def _measured(tile: Tensor) -> tuple[Tensor, Tensor, set[str]]:
    """(norms of the rows, those of the rows rounded to bf16, dtypes that hold all numbers)."""
    held = {p for p in EPSILON if torch.equal(tile.to(getattr(torch, p)).to(tile.dtype), tile)}
    return tile.double().norm(dim=1), tile.bfloat16().double().norm(dim=1), held


def _means(norms: Tensor, groups: list[Tensor]) -> tuple[float, ...]:
    """One mean a group, to the digits that count."""
    return tuple(float(f"{part.mean().item():.7g}") for part in norms.split([len(group) for group in groups]))


def norms_of(module: nn.Module) -> RowNorms | None:
    """`row_norms` of a plain module as it is now; None where it cannot be adapted."""
    base = stored_in(module)
    return None if base is None else known(row_norms(base, module))
