"""What the project promises about time and memory, and the table that says whether measurements keep it."""

from __future__ import annotations

from dataclasses import dataclass

from ..support.tables import markdown
from .shapes import BESIDE
from .tables import MIB, NOT_MEASURED, SHORT, WAYS
from .train_step import CHECKPOINTED, PLAIN

BF16, FP32 = "bfloat16", "float32"
(SHAPE,) = BESIDE


@dataclass(frozen=True)
class Target:
    """One promise: a figure of a measurement, at most (or at least) a limit that may depend on dtype or rank."""

    label: str
    what: str
    """The measurement, with the variant that it is of: `train_step`, `train_step_nf4`."""
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


STEP = {"16": 1.05, "24": 1.05, "64": 1.07}
PEFT_STEP = {FP32: 1.02, BF16: 0.95}

TARGETS = (
    Target("step, DoRA / LoRA", "train_step", (PLAIN, "ratios", "dora/lora"), {"16": 1.05, "64": 1.07}),
    Target("step, DoRA / PEFT's LoRA", "train_step", (PLAIN, "ratios", "dora/lora_peft"), PEFT_STEP),
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
"""Of the main model, by dtype and rank."""

OTHER_TARGETS = (
    Target("nf4: step, QDoRA / QLoRA", "train_step_nf4", (PLAIN, "ratios", "dora/lora"), {"all": 1.05}),
    Target(f"{SHAPE}: step, DoRA / LoRA", f"train_step_{SHAPE}", (PLAIN, "ratios", "dora/lora"), {"24": 1.05}),
    Target(f"{SHAPE}: step, DoRA / PEFT's LoRA", f"train_step_{SHAPE}", (PLAIN, "ratios", "dora/lora_peft"), PEFT_STEP),
    Target(
        f"{SHAPE}: step, accumulation + checkpointing, DoRA / LoRA",
        f"train_step_{SHAPE}",
        (CHECKPOINTED, "ratios", "dora/lora"),
        {"all": 1.03},
    ),
    Target(f"{SHAPE}: unmerged decode, DoRA / LoRA", f"decode_{SHAPE}", ("ratios", "dora/lora"), {"all": 1.03}),
)
"""Of a quantized base, and of the shape that stands beside the main model."""

HOST_TARGETS = (
    Target("forward, DoRA / PEFT's DoRA", "host", ("ratios", "dora/dora_peft", "forward_min"), {"all": 0.8}),
    Target("backward, DoRA / PEFT's DoRA", "host", ("ratios", "dora/dora_peft", "backward_min"), {"all": 1.1}),
    Target("decode, DoRA / PEFT's LoRA", "host", ("ratios", "dora/lora_peft", "decode_min"), {"all": 0.8}),
    *(
        Target(f"operations in a layer's {part}, {title}", "host", ("operations", arm, part, "in_the_call"), {"all": limit})
        for arm, title, limits in (("dora", "DoRA", (5, 11, 4)), ("lora", "LoRA", (3, 8, 3)))
        for part, limit in zip(("forward", "backward", "decode"), limits, strict=True)
    ),
    Target("host reads of a DoRA layer's forward", "host", ("host_reads", "dora", "a_layer"), {"all": 0}),
    Target("host reads of a DoRA model's forward", "host", ("host_reads", "dora", "a_model_forward"), {"all": 1}),
)
"""Of a small layer (`host.py`): ratios of the least times, and counts of a forward with nothing to prepare."""

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


Results = dict[str, dict]
"""Of one type of device: the content of the JSON files by measurement, variant and threads (`record.py`), as in
`train_step`, `train_step_nf4`, `decode_llama-768-shape_1_thread`."""

TIMES = "Of a step or a decode: wall time with as many threads as the machine gives, and the CPU time of one thread."


def targets(cpu: Results, gpu: Results) -> str:
    """Promise, limit, and the figure by dtype and rank on CPU; bold where it is missed; one column for the GPU."""
    where = columns(cpu, ("train_step", "decode", "memory"))
    head = ["", "target", *([f"{SHORT[dtype]} r{rank}" for dtype, rank in where] or ["CPU"]), "GPU"]
    rows = []
    for target in TARGETS:
        cells = [promise(target, cpu, "cpu", *one) for one in where] or [NOT_MEASURED]
        rows.append([target.label, target.words, *cells, one_cell(target, gpu, "cuda")])
    parts = [markdown(head, rows), TIMES]
    for title, some in (
        ("Other bases and sizes:", OTHER_TARGETS),
        (f"One small layer, where the host is the limit ({host_size(cpu)}):", HOST_TARGETS),
        (f"Norm of one layer ({norm_size(cpu)}):", NORM_TARGETS),
    ):
        rows = [[t.label, t.words, one_cell(t, cpu, "cpu"), one_cell(t, gpu, "cuda")] for t in some]
        parts += [title, markdown(["", "target", "CPU", "GPU"], rows)]
    return "\n\n".join(parts)


def columns(results: Results, measurements: tuple[str, ...]) -> list[tuple[str, str]]:
    """Every (dtype, rank) that one of the measurements has with any number of threads, in their order."""
    found = {}
    for name in (what + way.suffix for what in measurements for way in WAYS["cpu"]):
        for dtype, ranks in results.get(name, {}).get("result", {}).items():
            found |= {(dtype, rank): None for rank in ranks}
    return list(found)


def promise(target: Target, results: Results, device: str, dtype: str, rank: str) -> str:
    """The figure of one dtype and rank, in bold where it misses the target; of a time one figure for each way to take it."""
    shown = []
    for way in WAYS[device]:
        value = find(results, (target.what + way.suffix, "result", dtype, rank, *target.path))
        timed = isinstance(value, dict)
        if timed:
            value = value.get(way.clock) and value[way.clock]["p50"]
        if value is not None:
            shown.append(_figure(target, value, dtype, rank, f" {way.word}" if timed else ""))
    return ", ".join(shown) or NOT_MEASURED


def _figure(target: Target, value: float, dtype: str, rank: str, word: str) -> str:
    value = value if isinstance(value, int) and target.unit == 1 else value / target.unit
    shown = str(value) if isinstance(value, int) else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
    return f"**{shown}**{word} (missed)" if target.met(value, dtype, rank) is False else shown + word


def one_cell(target: Target, results: Results, device: str) -> str:
    """The figures of every dtype and rank in one cell."""
    found = [(d, r, promise(target, results, device, d, r)) for d, r in columns(results, (target.what,))]
    return "; ".join(f"{SHORT[d]} r{r} {shown}" for d, r, shown in found if shown != NOT_MEASURED) or NOT_MEASURED


def norm_size(results: Results) -> str:
    sizes = [
        f"{size} × {size}, {SHORT[dtype]}, rank {rank}"
        for dtype, ranks in results.get("norm", {}).get("result", {}).items()
        for rank, by_size in ranks.items()
        for size in by_size
    ]
    return ", ".join(sizes) or NOT_MEASURED


def host_size(results: Results) -> str:
    if "host" not in results:
        return NOT_MEASURED
    s = results["host"]["facts"]["settings"]
    dtypes = ", ".join(SHORT[dtype] for dtype in results["host"]["result"])
    return f"{s['host_width']} × {s['host_width']}, {dtypes}, rank {s['host_rank']}, {s['host_tokens']} tokens, one thread"
