"""What the project promises about time and memory, and the table that says whether measurements keep it."""

from __future__ import annotations

from dataclasses import dataclass

from ..support.tables import markdown
from .tables import MIB, NOT_MEASURED, SHORT, main_clock
from .train_step import CHECKPOINTED, PLAIN

BF16, FP32 = "bfloat16", "float32"


@dataclass(frozen=True)
class Target:
    """One promise: a figure of a measurement, at most (or at least) a limit that may depend on dtype or rank."""

    label: str
    what: str
    path: tuple[str, ...]
    """Where the figure is below {dtype: {rank: …}}; "*" is every key there."""
    limits: dict[str, float]
    """By dtype, by rank, or under "all"."""
    at_least: bool = False
    unit: float = 1.0
    """The figure is divided by this."""

    def limit(self, dtype: str, rank: str) -> float | None:
        """None: nothing is promised there."""
        return next((self.limits[key] for key in (dtype, rank, "all") if key in self.limits), None)

    def met(self, value: float, dtype: str, rank: str) -> bool | None:
        limit = self.limit(dtype, rank)
        return None if limit is None else value >= limit if self.at_least else value <= limit

    @property
    def words(self) -> str:
        """`≤ 1.05 r16, ≤ 1.08 r64`."""
        sign = "≥" if self.at_least else "≤"
        names = {"all": "", BF16: " bf16", FP32: " fp32"}
        return ", ".join(f"{sign} {limit:g}{names.get(key, f' r{key}')}" for key, limit in self.limits.items())


TARGETS = (
    Target("step, DoRA / LoRA", "train_step", (PLAIN, "ratios", "dora/lora"), {"16": 1.05, "64": 1.08}),
    Target("step, DoRA / PEFT's LoRA", "train_step", (PLAIN, "ratios", "dora/lora_peft"), {FP32: 1.05, BF16: 0.93}),
    Target(
        "step beyond the frozen base, DoRA / PEFT's DoRA",
        "train_step",
        (PLAIN, "ratios", "(dora-frozen)/(dora_peft-frozen)"),
        {FP32: 0.60, BF16: 0.30},
    ),
    Target("step, accumulation + checkpointing, DoRA / LoRA", "train_step", (CHECKPOINTED, "ratios", "dora/lora"), {"all": 1.03}),
    Target("bytes for backward, DoRA / LoRA", "memory", (PLAIN, "ratios", "dora/lora", "live_bytes"), {FP32: 1.14, BF16: 1.12}),
    Target(
        "bytes with checkpointing, DoRA / LoRA", "memory", ("checkpointing", "ratios", "dora/lora", "live_bytes"), {"all": 1.01}
    ),
    Target(
        "bytes packed for backward, DoRA / PEFT's DoRA",
        "memory",
        (PLAIN, "ratios", "dora/dora_peft", "packed_bytes"),
        {FP32: 0.63, BF16: 0.46},
    ),
    Target("the same without what PEFT packs and drops again", "memory", (PLAIN, "ratios", "dora/dora_peft", "live_bytes"), {}),
    Target("unmerged decode, DoRA / LoRA", "decode", ("ratios", "dora/lora"), {"all": 1.03}),
    Target("unmerged decode, PEFT's DoRA / DoRA", "decode", ("ratios", "dora_peft/dora"), {"all": 2.0}, at_least=True),
    Target("merged decode / base", "decode", ("ratios", "merged/frozen"), {"all": 1.02}),
)
"""Of a whole model, by dtype and rank."""

NORM_TARGETS = (
    Target("extra memory, MiB", "norm", ("*", "arms", "doratune", "peak_bytes"), {"all": 16.0}, unit=MIB),
    Target("largest relative error, s·B·A 0.01 of W", "norm", ("*", "errors", "0.01", "doratune"), {"all": 1e-5}),
    Target("largest relative error, s·B·A 0.1 of W", "norm", ("*", "errors", "0.1", "doratune"), {"all": 3e-5}),
)


def find(node, path: tuple[str, ...]):
    """The value at `path`, the first one under "*"; None where there is none."""
    for key in path:
        if not isinstance(node, dict) or not node:
            return None
        node = next(iter(node.values())) if key == "*" else node.get(key)
    return node


def median(value, clock: str) -> float | None:
    """The figure itself, or the median by the clock where it is a time."""
    times = value.get(clock) if isinstance(value, dict) else {"p50": value}
    return times and times["p50"]


Results = dict[str, dict]
"""{measurement: the content of its JSON file}, of one type of device."""


def targets(cpu: Results, gpu: Results) -> str:
    """Promise, limit, and the figure by dtype and rank on CPU; bold where it is missed; one column for the GPU."""
    where = columns(cpu, ("train_step", "decode", "memory"))
    head = ["", "target", *([f"{SHORT[dtype]} r{rank}" for dtype, rank in where] or ["CPU"]), "GPU"]
    rows = []
    for target in TARGETS:
        cells = [promise(target, cpu, "cpu", *one) for one in where] or [NOT_MEASURED]
        rows.append([target.label, target.words, *cells, one_cell(target, gpu, "cuda")])
    norm_rows = [[t.label, t.words, one_cell(t, cpu, "cpu"), one_cell(t, gpu, "cuda")] for t in NORM_TARGETS]
    parts = [markdown(head, rows), f"Norm of one layer ({norm_size(cpu)}):", markdown(["", "target", "CPU", "GPU"], norm_rows)]
    return "\n\n".join(parts)


def columns(results: Results, measurements: tuple[str, ...]) -> list[tuple[str, str]]:
    """Every (dtype, rank) that one of the measurements has, in their order."""
    found = {}
    for what in measurements:
        for dtype, ranks in results.get(what, {}).get("result", {}).items():
            found |= {(dtype, rank): None for rank in ranks}
    return list(found)


def promise(target: Target, results: Results, device: str, dtype: str, rank: str) -> str:
    """The figure of one dtype and rank, in bold where it misses the target."""
    value = median(find(results, (target.what, "result", dtype, rank, *target.path)), main_clock(device))
    if value is None:
        return NOT_MEASURED
    value /= target.unit
    shown = f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3f}"
    return f"**{shown}** (missed)" if target.met(value, dtype, rank) is False else shown


def one_cell(target: Target, results: Results, device: str) -> str:
    """The figures of every dtype and rank in one cell."""
    where = columns(results, (target.what,))
    return ", ".join(f"{SHORT[d]} r{r} {promise(target, results, device, d, r)}" for d, r in where) or NOT_MEASURED


def norm_size(results: Results) -> str:
    sizes = [
        f"{size} × {size}, {SHORT[dtype]}, rank {rank}"
        for dtype, ranks in results.get("norm", {}).get("result", {}).items()
        for rank, by_size in ranks.items()
        for size in by_size
    ]
    return ", ".join(sizes) or NOT_MEASURED
