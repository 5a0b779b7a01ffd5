"""`doratune compare GRID.yaml [overrides]`."""

from __future__ import annotations

import sys

from .arguments import parse
from .following import after_run
from .inputs import refuse_missing
from .output import keep_freed_memory, print_json, progress, say, say_next

EXAMPLE = "doratune compare recipes/compare_demo.yaml --output runs/compare"


def main(argv: list[str]) -> int:
    from ..comparison.recipe import CompareRecipe

    grid, as_json = parse(CompareRecipe, argv, "compare", EXAMPLE, recipe=True)
    keep_freed_memory()
    shared = grid.check()
    if not grid.dry_run:
        refuse_missing({"data": shared.data, "eval_data": shared.eval_data, "tasks": shared.tasks})
    from pathlib import Path

    from ..comparison.grid import compare
    from ..comparison.launch import Stopped
    from ..errors import UserError
    from ..report.page import build
    from ..training.objectives import DEFAULT

    try:
        summary = compare(grid, say, progress)
    except Stopped as stop:
        print(f"doratune compare: {stop}", file=sys.stderr)
        return stop.status
    if summary is None:
        return 0
    say("\n" + summary.text() + "\n")
    words = [pair.words for pair in summary.pairs if pair.score == summary.score]
    page = Path(grid.output) / "report.html"
    try:
        title = f"{', '.join(grid.methods)} on {Path(grid.output).name}"
        build([Path(grid.output)], page, title=title, notes=[*words, *summary.notes], overwrite=True, say=say)
        say(f"page: {page}")
    except UserError as error:  # the grid stands without its page
        say(f"no page: {error}")
    say_next(*after_run(Path(summary.best_run), shared.objective == DEFAULT))
    if as_json:
        print_json(summary.to_dict() | {"output": grid.output})
    return 0
