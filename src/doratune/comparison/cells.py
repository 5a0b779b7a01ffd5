"""The cells of a grid: each is one plain `doratune train` command with a folder of its own.

    CELLS/dora-r16-n640-lr0.001-s0      method, rank, number of examples, learning rate, seed (without what does not apply)

A grid has two stages. The sweep runs every method at each of its learning rates, at one rank (or at every one) and one size; the
final cells run every method, rank, size and seed at the rate that the sweep chose. The cells that belong to both run once.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..support.yaml_text import to_yaml
from ..training.recipe import TrainRecipe
from .recipe import RANKLESS, CompareRecipe

Rates = dict[tuple[str, int | None], float]
"""{(method, rank): learning rate}."""


@dataclass(frozen=True)
class Cell:
    """One training run; rank is None for methods without one, size None for the recipe's."""

    method: str
    rank: int | None
    size: int | None
    lr: float
    seed: int

    @property
    def name(self) -> str:
        lr = f"{self.lr:g}" if float(f"{self.lr:g}") == self.lr else repr(self.lr)
        parts = [self.method, f"r{self.rank}" if self.rank else "", f"n{self.size}" if self.size else "", f"lr{lr}"]
        return "-".join([part for part in parts if part] + [f"s{self.seed}"])

    @property
    def configuration(self) -> tuple[str, int | None, int | None]:
        """What a row of the table is about: seeds are averaged over, the learning rate was chosen."""
        return self.method, self.rank, self.size


def settings_of(cell: Cell, grid: CompareRecipe, shared: TrainRecipe) -> dict:
    """The settings in which this cell differs from the shared recipe."""
    settings = {k: v for k, v in grid.settings_of(cell.method).items() if k != "rank_factor"}
    if cell.rank is not None:
        settings["rank"] = cell.rank
        if shared.alpha is not None and "alpha" not in settings:
            settings["alpha"] = shared.alpha * cell.rank / shared.rank  # the scaling stays what the recipe has
    if cell.size is not None:
        settings["limit"] = cell.size
    return settings | {"lr": cell.lr, "seed": cell.seed}


def recipe_of(cell: Cell, grid: CompareRecipe, shared: TrainRecipe) -> TrainRecipe:
    """The resolved training recipe of a cell, as its folder records it."""
    return dataclasses.replace(shared, **settings_of(cell, grid, shared), output=str(folder_of(cell, grid)))


def folder_of(cell: Cell, grid: CompareRecipe) -> Path:
    return Path(grid.output) / "cells" / cell.name


def command(cell: Cell, grid: CompareRecipe, shared: TrainRecipe, *extra: str) -> list[str]:
    """The words of the cell's command, without the program's name."""
    words = ["train", str(Path(grid.output) / "recipe.yaml")]
    for name, value in settings_of(cell, grid, shared).items():
        words += [f"--{name}", _word(value)]
    return [*words, "--output", str(folder_of(cell, grid)), *extra]


def _word(value) -> str:
    """A setting's value as doratune train reads it back: text and numbers as they are, the rest as YAML on one line."""
    if isinstance(value, list | dict | bool) or value is None:
        return to_yaml(value, flow=True)
    return str(value)


def shown(words: list[str]) -> str:
    return shlex.join(["doratune", *words])


def ranks_of(method: str, grid: CompareRecipe, shared: TrainRecipe) -> list[int | None]:
    """The ranks at which a method runs: its own, or the grid's times its factor, or none."""
    settings = grid.settings_of(method)
    if settings["method"] in RANKLESS:
        return [None]
    if "rank" in settings:
        return [settings["rank"]]
    return [max(1, round(rank * settings.get("rank_factor", 1))) for rank in grid.ranks or [shared.rank]]


def swept_ranks(method: str, grid: CompareRecipe, shared: TrainRecipe) -> dict[int | None, int | None]:
    """{rank of the method: rank at which its learning rate is swept}."""
    ranks = ranks_of(method, grid, shared)
    if grid.sweep_ranks == "every":
        return {rank: rank for rank in ranks}
    position = grid.ranks.index(shared.rank) if len(ranks) > 1 and shared.rank in grid.ranks else 0
    return dict.fromkeys(ranks, ranks[position])


def sweep(grid: CompareRecipe, shared: TrainRecipe) -> list[Cell]:
    """The cells of the learning-rate sweep; none where no method has a choice."""
    size = max(grid.sizes) if grid.sizes else None
    return [
        Cell(method, rank, size, lr, seed)
        for method in grid.methods
        if len(lrs := grid.lrs_of(method, shared)) > 1
        for rank in dict.fromkeys(swept_ranks(method, grid, shared).values())
        for lr in lrs
        for seed in grid.seeds[: grid.tune_seeds]
    ]


def rates(grid: CompareRecipe, shared: TrainRecipe, lrs: dict[str, float]) -> Rates:
    """One rate a method, at all of its ranks."""
    return {(method, rank): lr for method, lr in lrs.items() for rank in ranks_of(method, grid, shared)}


def finals(grid: CompareRecipe, shared: TrainRecipe, chosen: Rates) -> list[Cell]:
    """The cells that the tables are made of, at the learning rates chosen; first all methods on the first seed."""
    return [
        Cell(method, rank, size, chosen[method, rank], seed)
        for seed in grid.seeds
        for size in grid.sizes or [None]
        for method in grid.methods
        for rank in ranks_of(method, grid, shared)
        if (method, rank) in chosen
    ]


def refuse_mixed(grid: CompareRecipe, shared: TrainRecipe) -> None:
    """Every cell has a folder of its own, counts once, and is a run that doratune train takes.

    Raises:
        UserError: two cells of one folder, a method twice at one rank, or a cell's setting out of range.
    """
    for method in grid.methods:
        ranks = ranks_of(method, grid, shared)
        if twice := [rank for rank in ranks if ranks.count(rank) > 1]:
            raise UserError(f"ranks: {method} runs at rank {twice[0]} for two of {grid.ranks}; leave one of them out")
    folders: dict[str, Cell] = {}
    offered = {lr for method in grid.methods for lr in grid.lrs_of(method, shared)}
    every = [
        cell
        for lr in offered
        for cell in finals(grid, shared, rates(grid, shared, dict.fromkeys(grid.methods, lr)))
        if lr in grid.lrs_of(cell.method, shared)
    ]
    for cell in every:
        if folders.setdefault(cell.name, cell) != cell:
            raise UserError(f"methods: {cell.method} and {folders[cell.name].method} share the folder {cell.name}; rename one")
        if cell.seed == grid.seeds[0]:
            try:
                recipe_of(cell, grid, shared).check()
            except (TypeError, ValueError) as error:  # UserError is one; else a value of another type
                raise UserError(f"{cell.method}: {error}") from None
