"""The learning rate of each method, or of each of its ranks: the one with the lowest evaluation loss in its sweep.

A sweep has as many rates for every method; a best rate at its edge is said. Cost: reads the metrics of the sweep's cells.
"""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import UserError
from ..training.recipe import TrainRecipe
from .cells import Rates, sweep, swept_ranks
from .collect import Result, collect
from .recipe import CompareRecipe


def choose(grid: CompareRecipe, shared: TrainRecipe) -> tuple[Rates, list[str]]:
    """({(method, rank): learning rate of the lowest mean evaluation loss in its sweep}, remarks).

    Raises:
        UserError: no method's sweep has a finished cell.
    """
    results, notes = collect(sweep(grid, shared), grid, shared)
    chosen: Rates = {}
    for method in grid.methods:
        offered, places = grid.lrs_of(method, shared), swept_ranks(method, grid, shared)
        for place in dict.fromkeys(places.values()):
            ranks = [rank for rank in places if places[rank] == place]
            name = method if len(set(places.values())) == 1 else f"{method} r{place}"
            losses = mean_losses([r for r in results if (r.cell.method, r.cell.rank) == (method, place)], grid.tune_seeds)
            if len(offered) > 1 and not losses:
                notes.append(f"{name}: no learning rate of its sweep finished, so it is left out; see {Path(grid.output) / 'logs'}")
                continue
            best = offered[0] if len(offered) == 1 else min(losses, key=losses.__getitem__)
            chosen |= {(method, rank): best for rank in ranks}
            if len(offered) > 1:
                tried = ", ".join(f"{lr:g}: {losses[lr]:.4f}" if lr in losses else f"{lr:g}: failed" for lr in sorted(offered))
                edge = "; the best is at the edge of the sweep, widen it" if best in (min(offered), max(offered)) else ""
                notes.append(f"{name}: learning rate {best:g} of {len(offered)} by evaluation loss ({tried}){edge}")
    if not chosen:
        raise UserError(f"no cell of the sweep finished; see {Path(grid.output) / 'logs'}")
    return chosen, notes


def mean_losses(results: list[Result], seeds: int) -> dict[float, float]:
    """{learning rate: mean evaluation loss} of the rates that have a finite loss for so many seeds."""
    losses: dict[float, list[float]] = {}
    for result in results:
        loss = result.metrics.get("eval_loss")
        if loss is not None and math.isfinite(loss):
            losses.setdefault(result.cell.lr, []).append(loss)
    return {lr: sum(values) / len(values) for lr, values in losses.items() if len(values) == seeds}
