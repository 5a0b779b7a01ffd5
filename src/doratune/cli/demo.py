"""`doratune demo`: what `make demo` runs."""

from __future__ import annotations

from .arguments import parse
from .output import keep_freed_memory, print_json, progress, say

EXAMPLE = "doratune demo --output runs/demo"


def main(argv: list[str]) -> int:
    from ..demo.settings import DemoSettings

    settings, _ = parse(DemoSettings, argv, "demo", EXAMPLE)
    keep_freed_memory()
    import sys
    from importlib.resources import files

    from ..demo.demonstration import demo
    from ..training.recipe import TrainRecipe
    from ..training.train import Interrupted

    path = settings.recipe or str(files("doratune.demo") / "demo.yaml")
    recipe, _ = parse(TrainRecipe, [path], "demo", EXAMPLE, recipe=True)
    try:
        metrics = demo(settings, recipe, say, progress)
    except Interrupted as stop:
        print(f"doratune demo: {stop}", file=sys.stderr)
        return stop.status
    shown = {k: v for k, v in metrics.items() if k not in ("training", "results")}
    shown["training"] = {k: v for k, v in metrics["training"].items() if k != "log"}
    print_json(shown)
    return 0
