"""The tables of docs/performance.md, one function a measurement: its JSON's `result` and the type of device → Markdown blocks."""

from __future__ import annotations

from ..support.tables import markdown
from .tables import CLOCKS, NOT_MEASURED, SHORT, main_clock, mib, seconds, spread
from .targets import TARGETS, Results
from .train_step import CHECKPOINTED, PLAIN


def device_sections(results: Results, device: str, all: bool = True) -> list[str]:
    """Headings, where the figures come from, and tables of every measurement; all: also say which were not made."""
    parts = []
    for what, (title, tables) in SECTIONS.items():
        if not all and what not in results:
            continue
        parts.append(f"### {title}")
        parts += [origin(results[what]["facts"]), *tables(results[what]["result"], device)] if what in results else [NOT_MEASURED]
    return parts


def origin(facts: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    s = facts["settings"]
    return (
        f"{facts['date'][:10]}, {facts['device']}, threads: {facts['threads']}, {versions}, commit {facts['commit'] or 'unknown'}; "
        f"model {s['model']}, batch {s['batch_size']} × {s['length']}, {s['rounds']} rounds, kernel {s['kernel']}."
    )


def timed(one: dict, device: str, what: str = "", path: tuple[str, ...] = (), dtype: str = "", rank: str = "") -> list[str]:
    """Ratios with their targets, and the arms' own times."""
    limits = {t.path[-1]: t for t in TARGETS if t.what == what and t.path[:-1] == (*path, "ratios")}
    rows = []
    for name, value in one["ratios"].items():
        limit = limits[name].limit(dtype, rank) if name in limits else None
        words = "" if limit is None else f"{'≥' if limits[name].at_least else '≤'} {limit:g}"
        rows.append([name, words, *(spread(value, clock) for clock in CLOCKS[device])])
    clock = main_clock(device)
    times = ", ".join(f"{name} {seconds(arm, clock)}" for name, arm in one["arms"].items())
    return [markdown(["ratio", "target", *CLOCKS[device].values()], rows), f"Median {CLOCKS[device][clock]}: {times}."]


def train_tables(result: dict, device: str) -> list[str]:
    parts = []
    for scenario in (PLAIN, CHECKPOINTED):
        for dtype, ranks in result.items():
            for rank, scenarios in ranks.items():
                if scenario not in scenarios:  # measured at the first rank only
                    continue
                parts.append(f"{SHORT[dtype]}, rank {rank}, {scenario}:")
                parts += timed(scenarios[scenario], device, "train_step", (scenario,), dtype, rank)
    return parts


def decode_tables(result: dict, device: str) -> list[str]:
    parts = []
    for dtype, ranks in result.items():
        for rank, one in ranks.items():
            parts += [f"{SHORT[dtype]}, rank {rank}:", *timed(one, device, "decode", (), dtype, rank)]
    return parts


def memory_tables(result: dict, device: str) -> list[str]:
    """MiB by arm and kind of count, and the ratios of both counts."""
    names = {"live_bytes": "alive", "saved_bytes": "saved", "packed_bytes": "packed"}
    names |= {"step_peak_bytes": "peak of a step", "step_extra_bytes": "beyond rest"}
    keys = list(names)[: 4 if device == "cuda" else 2]
    parts = ["`alive`: made by the forward and alive after it; `saved`: in the graph's saved tensors; without parameters, buffers."]
    for dtype, ranks in result.items():
        for rank, scenarios in ranks.items():
            for scenario, one in scenarios.items():
                rows = [[name, *(arm.get("failed") or mib(arm[key]) for key in keys)] for name, arm in one["arms"].items()] + [
                    [f"ratio {name}", *(f"{ratio[key]:.3f}" if key in ratio else "" for key in keys)]
                    for name, ratio in one["ratios"].items()
                ]
                parts += [f"{SHORT[dtype]}, rank {rank}, {scenario}:", markdown(["MiB", *(names[k] for k in keys)], rows)]
    return parts


def norm_tables(result: dict, device: str) -> list[str]:
    """Time, extra memory, and the error at each share of the change."""
    clock, parts = main_clock(device), []
    for dtype, ranks in result.items():
        for rank, sizes in ranks.items():
            for size, one in sizes.items():
                shares = list(one["errors"])
                rows = [
                    [name, seconds(arm, clock), mib(arm.get("peak_bytes"))]
                    + [f"{one['errors'][share][name]:.1e}" if name in one["errors"][share] else NOT_MEASURED for share in shares]
                    for name, arm in one["arms"].items()
                ]
                head = ["", f"median {CLOCKS[device][clock]}", "extra MiB", *(f"error, s·B·A {share} of W" for share in shares)]
                parts += [f"{size} × {size}, {SHORT[dtype]}, rank {rank}:", markdown(head, rows)]
    return parts


def layer_tables(result: dict, device: str) -> list[str]:
    parts = []
    for dtype, ranks in result.items():
        for rank, sizes in ranks.items():
            for size, one in sizes.items():
                parts += [f"{size} × {size}, {SHORT[dtype]}, rank {rank}:", *timed(one, device)]
    return parts


def size_tables(result: dict, device: str) -> list[str]:
    """One table a figure: ranks by sides."""
    clock = main_clock(device)
    figures = {
        "Step, dora/lora": lambda one: spread(one["ratios"].get("dora/lora"), clock),
        "Step, dora/frozen": lambda one: spread(one["ratios"].get("dora/frozen"), clock),
        "MiB kept for backward, dora − lora": lambda one: mib(one.get("extra_bytes")),
        "MiB of A, B and m": lambda one: mib(one.get("adapter_bytes")),
    }
    parts = []
    for dtype, ranks in result.items():
        for title, figure in figures.items():
            sides = list(next(iter(ranks.values())))
            rows = [[rank, *(figure(sizes[side]) for side in sides)] for rank, sizes in ranks.items()]
            parts += [f"{title} ({SHORT[dtype]}):", markdown(["rank", *(f"{side} × {side}" for side in sides)], rows)]
    return parts


SECTIONS = {
    "train_step": ("Training step", train_tables),
    "memory": ("Bytes kept for the backward pass", memory_tables),
    "norm": ("The norm of one layer", norm_tables),
    "decode": ("Unmerged decode", decode_tables),
    "layer": ("One layer", layer_tables),
    "sizes": ("Cost against size", size_tables),
}
"""measurement: (heading, its tables)."""
