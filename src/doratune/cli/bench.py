"""`doratune bench [--what train_step …] [--arms lora dora …]`."""

from __future__ import annotations

from ..bench.settings import BenchSettings
from .arguments import parse
from .output import print_json, progress, say

EXAMPLE = "doratune bench --what train_step memory --arms lora dora --ranks 16 --rounds 5"


def main(argv: list[str]) -> int:
    settings, as_json = parse(BenchSettings, argv, "bench", EXAMPLE)
    settings.check()
    from ..bench.measure import ratio_lines, run_all

    results = run_all(settings, say, progress)
    say("\n".join(["ratios: median (p20 to p80) of wall time, with one thread of CPU time", *ratio_lines(results)]))
    if as_json:
        print_json(results)
    return 0
