"""`inspect`: a table of what is adapted in an attached model, what was left out and why, and rows without direction.

Rows (columns) count as `zero` where the frozen weight has no direction (they stay plain LoRA rows for good), and as `near zero`
below 1e-3 of the median norm: their gain is sensitive, a large learning rate shows there first.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from ..directions import direction_for
from ..layers import kind_of
from ..layers.adapted import own_parameters
from ..layers.layouts import layer_at
from ..layers.shares import at_hand
from ..layers.wrappers import module_at
from ..layers.zero3 import numbers
from ..support.tables import aligned
from .attach import adapters, record_of
from .states import refuse_merged
from .targets import select

NEAR = 1e-3


@dataclass(frozen=True)
class Row:
    """One adapted layer; `shape` is the matrix of the maths (O, I), or (E, O, I) for experts."""

    module: str
    kind: str
    base: str
    direction: str
    shape: tuple[int, ...]
    rank: int
    magnitude: str
    trainable: int
    zero: int
    near_zero: int


@dataclass(frozen=True)
class Inspection:
    rows: list[Row]
    left_out: dict[str, str]
    trainable: int
    total: int
    fresh: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def table(self) -> str:
        """Lines of text: one for each adapted layer, each layer left out, and the sums."""
        heads = ("module", "kind", "base", "direction", "shape", "rank", "magnitude", "trainable", "zero rows", "near zero")
        cells = [
            (r.module, r.kind, r.base, r.direction, " x ".join(map(str, r.shape)), str(r.rank), r.magnitude, f"{r.trainable:,}")
            + (str(r.zero), str(r.near_zero))
            for r in self.rows
        ]
        lines = aligned(heads, cells, rule=False)
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        lines += [f"trained whole: {name}: {reason}" for name, reason in self.fresh.items()]
        zero, near = (sum(getattr(r, name) for r in self.rows) for name in ("zero", "near_zero"))
        share = 100 * self.trainable / self.total
        lines.append(f"{len(self.rows)} layers adapted, {self.trainable:,} trainable parameters ({share:.3g} % of {self.total:,})")
        lines.append(f"{zero} rows without direction (they stay plain LoRA rows), {near} near zero")
        return "\n".join(lines)


@torch.no_grad()
def inspect(model: nn.Module) -> Inspection:
    """What is adapted in an attached model.

    Raises:
        UserError: nothing is attached, or the adapter is merged.
    """
    record = record_of(model)
    refuse_merged(record, "doratune.inspect")
    record.registry.find_shares(model)
    rows = [_row(name, layer) for name, layer in adapters(model)]
    adapter = {id(p) for _, layer in adapters(model) for p in own_parameters(layer).values()}
    trainable = sum(numbers(p) for p in model.parameters() if p.requires_grad)
    total = sum(numbers(p) for p in model.parameters() if id(p) not in adapter)
    packed = sum(_uncounted(layer) for _, layer in adapters(model) if not layer.adapted.base.writable)
    return Inspection(rows, dict(record.left_out), trainable, total + packed, dict(record.fresh))


def count(model: nn.Module, config) -> tuple[int, int]:
    """(trainable numbers, the model's own numbers) that a configuration would give; the model may be on the meta device.

    The paper's parameter shares are trainable / (trainable + own).

    Raises:
        UserError: the configuration does not fit the model.
    """
    selection, trainable = select(model, config), 0
    own = sum(p.numel() for p in model.parameters())
    for name, rank in selection.ranks.items():
        module = layer_at(model, name)
        kind = kind_of(module)
        (*stack, rows, columns), direction = kind.base(module).shape(module), direction_for(config, rank)
        sizes = [size for key, size in direction.shapes((rows, columns), rank).items() if key not in direction.frozen]
        sizes += [(rows,) if kind.axis(config) == "output" else (columns,)] if config.has_magnitude else []
        trainable += math.prod(stack) * sum(math.prod(size) for size in sizes)
    for name in selection.also_train:
        trainable += sum(p.numel() for p in module_at(model, name).parameters())
    return trainable, own


def _uncounted(layer) -> int:
    """Numbers of a quantized weight that its stored tensor does not count."""
    rows, columns = layer.adapted.shape  # quantized storages hold one matrix
    weight = getattr(layer, "weight", None)
    return rows * columns - (weight.numel() if isinstance(weight, nn.Parameter) else 0)


def _row(name: str, layer) -> Row:
    a = layer.adapted
    with at_hand(layer, names=()):
        w2, directionless, _ = a.facts
        shape = tuple(a.shape)
    w = w2.sqrt()
    near = (w < NEAR * w.median()) & ~directionless if w.numel() else directionless
    return Row(
        module=name,
        kind=a.kind.name,
        base=a.base.name,
        direction=a.direction.name,
        shape=shape,
        rank=a.rank,
        magnitude=f"per {a.axis}" if a.magnitude else "none",
        trainable=sum(numbers(p) for p in own_parameters(layer).values() if p.requires_grad),
        zero=int(directionless.sum()),
        near_zero=int(near.sum()),
    )
