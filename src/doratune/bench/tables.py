"""Figures in words: a ratio with its spread, bytes in MiB; and which clock counts where."""

from __future__ import annotations

from typing import NamedTuple

MIB = 2**20
NOT_MEASURED = "not measured"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Way(NamedTuple):
    """How a time was taken."""

    suffix: str
    """Of the measurement's name."""
    clock: str
    title: str
    word: str


WALL = Way("", "wall_s", "wall time", "wall")
ONE_THREAD = Way("_1_thread", "cpu_s", "CPU time, one thread", "CPU")
WAYS = {"cpu": (WALL, ONE_THREAD), "cuda": (WALL,)}
"""By type of device. With several threads the CPU time also counts threads that spin while they wait: wall time there."""


def way_of(measurement: str) -> Way:
    """`train_step_1_thread` → one thread's CPU time."""
    return ONE_THREAD if measurement.endswith(ONE_THREAD.suffix) else WALL


def spread(value: dict | None, clock: str) -> str:
    """`1.041 (1.020 to 1.066)`: median, 20th and 80th percentile."""
    times = (value or {}).get(clock)
    return f"{times['p50']:.3f} ({times['p20']:.3f} to {times['p80']:.3f})" if times else NOT_MEASURED


def mib(size: float | None) -> str:
    return NOT_MEASURED if size is None else f"{size / MIB:,.1f}" if size >= MIB / 10 else f"{size / MIB:.4f}"


def seconds(one: dict, clock: str) -> str:
    """Median time of an arm, or why there is none."""
    return one["failed"] if "failed" in one else f"{one[clock]['p50']:.4g} s"
