"""`doratune bench [--what train_step …] [--arms lora dora …]`."""

from __future__ import annotations

from ..bench.settings import BenchSettings
from .arguments import parse
from .output import keep_freed_memory, print_json, progress, say

EXAMPLE = "doratune bench --what train_step memory --arms lora dora --ranks 16 --rounds 5"


def main(argv: list[str]) -> int:
    settings, as_json = parse(BenchSettings, argv, "bench", EXAMPLE)
    settings.check()
    keep_freed_memory()
    from ..bench.measure import ratio_lines, run_all

    results = run_all(settings, say, progress)
    clock = "cpu_s" if settings.torch_device().type == "cpu" else "wall_s"
    say("\n".join([f"ratios of {clock}: median (p20 to p80)", *ratio_lines(results, clock)]))
    if as_json:
        print_json(results)
    return 0
