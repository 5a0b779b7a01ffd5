"""`doratune compare GRID.yaml [overrides]`."""

from __future__ import annotations

import sys

from .arguments import parse
from .output import print_json, progress, say

EXAMPLE = "doratune compare recipes/compare_demo.yaml --output runs/compare"


def main(argv: list[str]) -> int:
    from ..comparison.recipe import CompareRecipe

    grid, as_json = parse(CompareRecipe, argv, "compare", EXAMPLE, recipe=True)
    from ..comparison.launch import Stopped
    from ..comparison.run import compare

    try:
        summary = compare(grid, say, progress)
    except Stopped as stop:
        print(f"doratune compare: {stop}", file=sys.stderr)
        return stop.status
    if summary is None:
        return 0
    say("\n" + summary.text())
    if as_json:
        print_json(summary.to_dict() | {"output": grid.output})
    return 0
