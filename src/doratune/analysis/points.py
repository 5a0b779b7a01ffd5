"""The points of Fig. 2 and Fig. 3: one per weight and checkpoint of a run, their regression line and correlation. Cost: nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Point:
    """One weight at one checkpoint; `layer` is its number in the model, `module` its last name (q_proj).

    `relative` is the mean of |m_t − m_0|/m_0. Only the last checkpoint has an effective rank of its update and, where data for it
    was given, the gradient's share on magnitudes."""

    name: str
    layer: int
    module: str
    step: int
    magnitude: float
    direction: float
    relative: float | None = None
    effective_rank: float | None = None
    gradient_share: float | None = None


@dataclass(frozen=True)
class Line:
    """Least squares of ΔM on ΔD over all points, and Pearson's correlation (Fig. 2).

    `interval` is the correlation's, of 95 %: weights are drawn with replacement, each with all its checkpoints, which are no
    observations of their own. None where there are fewer than three weights."""

    slope: float
    intercept: float
    correlation: float
    points: int
    interval: tuple[float, float] | None = None


def layer_number(name: str) -> int:
    """The first number in a module's name: its layer; -1 where there is none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def module_name(name: str) -> str:
    """The last part of a module's name that is no number: `q_proj`, also of expert 3 in `layers.0.mlp.experts.up_proj.3`."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def along_layers(points: list[Point], module: str, quantity: str) -> tuple[list[int], list[float]]:
    """(layers, mean of a quantity over the module's weights there) of Fig. 3; layers without the quantity are left out."""
    layers: dict[int, list[float]] = {}
    for point in points:
        if point.module == module and (value := getattr(point, quantity)) is not None:
            layers.setdefault(point.layer, []).append(value)
    groups = sorted(layers.items())
    return [layer for layer, _ in groups], [sum(values) / len(values) for _, values in groups]


def regression(points: list[Point]) -> Line:
    """ΔM on ΔD.

    Raises:
        UserError: fewer than three points, or no spread in one of the two.
    """
    pairs = torch.tensor([(p.direction, p.magnitude) for p in points], dtype=torch.float64)
    if len(points) < 3 or not (pairs.std(0) > 0).all():
        raise UserError(f"{len(points)} points without enough spread have no correlation; take more layers or checkpoints")
    x, y = (pairs - pairs.mean(0)).unbind(1)
    slope = (x * y).sum() / x.square().sum()
    correlation = (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()
    intercept = pairs[:, 1].mean() - slope * pairs[:, 0].mean()
    return Line(slope.item(), intercept.item(), correlation.item(), len(points), _interval([p.name for p in points], pairs))


def _interval(names: list[str], pairs: Tensor, draws: int = 2000) -> tuple[float, float] | None:
    """Of the correlation, from how often each draw takes each weight; pairs: (points, 2)."""
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if (count := len(order)) < 3:
        return None
    drawn = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    times = times[:, [order[name] for name in names]]  # draws × points
    x, y = pairs.unbind(1)
    shares = times / times.sum(1, keepdim=True)
    x, y = x - (shares @ x)[:, None], y - (shares @ y)[:, None]
    xx, yy, xy = ((shares * product).sum(1) for product in (x * x, y * y, x * y))
    values = (xy / (xx * yy).sqrt())[(xx > 0) & (yy > 0)]
    if not len(values):
        return None
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
