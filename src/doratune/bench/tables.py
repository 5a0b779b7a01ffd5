"""Figures in words: a ratio with its spread, bytes in MiB."""

from __future__ import annotations

MIB = 2**20
NOT_MEASURED = "not measured"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
CLOCKS = {"cpu": {"cpu_s": "CPU time", "wall_s": "wall time"}, "cuda": {"wall_s": "wall time"}}
"""By type of device the clocks that are shown; the first is the one that targets are about."""


def main_clock(device: str) -> str:
    return next(iter(CLOCKS[device]))


def spread(value: dict | None, clock: str) -> str:
    """`1.041 (1.020 to 1.066)`: median, 20th and 80th percentile."""
    times = (value or {}).get(clock)
    return f"{times['p50']:.3f} ({times['p20']:.3f} to {times['p80']:.3f})" if times else NOT_MEASURED


def mib(size: float | None) -> str:
    return NOT_MEASURED if size is None else f"{size / MIB:,.1f}" if size >= MIB / 10 else f"{size / MIB:.4f}"


def seconds(one: dict, clock: str) -> str:
    """Median time of an arm, or why there is none."""
    return one["failed"] if "failed" in one else f"{one[clock]['p50']:.4g} s"
