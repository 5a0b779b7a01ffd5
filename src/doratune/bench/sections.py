"""The tables of docs/performance.md, one function a measurement: what its JSON files hold → Markdown blocks.

A measurement of a model may have two files, one with all threads and one with one thread: their times stand side by side.
"""

from __future__ import annotations

from ..support.tables import markdown
from .host_tables import host_tables
from .tables import NOT_MEASURED, SHORT, WALL, WAYS, Way, mib, seconds, spread
from .targets import OTHER_TARGETS, TARGETS, Results
from .train_step import CHECKPOINTED, PLAIN


def device_sections(results: Results, device: str, variant: str = "", all: bool = True) -> list[str]:
    """Headings, where the figures come from, and tables of every measurement of one variant; all: also say which were not made."""
    parts = []
    for what, (title, tables) in SECTIONS.items():
        name = f"{what}_{variant}" if variant else what
        files = {way: results[name + way.suffix] for way in WAYS[device] if name + way.suffix in results}
        if not files and (not all or (variant and what not in OF_A_MODEL)):
            continue
        parts.append(f"### {title}")
        parts += [origin(file["facts"], what) for file in files.values()]
        parts += tables(name, files, device) if files else [NOT_MEASURED]
    return parts


def origin(facts: dict, what: str) -> str:
    """Where a measurement's figures come from."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    s = facts["settings"]
    size = f"model {s['model']}, batch {s['batch_size']} × {s['length']}, {s['rounds']} rounds"
    if what.startswith("train_step"):
        size += f", accumulation {s['accumulation']} where there is one"
    if what == "host":
        width, tokens = s["host_width"], s["host_tokens"]
        size = f"{s['host_layers']} layers of {width} × {width}, {tokens} tokens, {s['host_rounds']} rounds"
    return (
        f"{facts['date'][:10]}, {facts['device']}, threads: {facts['threads']}, {versions}, commit {facts['commit'] or 'unknown'}; "
        f"{size}, kernel {s['kernel']}."
    )


Files = dict[Way, dict]
"""How a measurement was timed → its JSON file."""


def timed(ones: dict[Way, dict], device: str, what: str = "", path: tuple[str, ...] = (), dtype: str = "", rank: str = ""):
    """Ratios with their targets, and the arms' own times; ones: the same measurement by each way to time it."""
    limits = {t.path[-1]: t for t in (*TARGETS, *OTHER_TARGETS) if t.what == what and t.path[:-1] == (*path, "ratios")}
    ways = WAYS[device] if what else (WALL,)
    rows = []
    for name in dict.fromkeys(name for one in ones.values() for name in one["ratios"]):
        limit = limits[name].limit(dtype, rank) if name in limits else None
        words = "" if limit is None else f"{'≥' if limits[name].at_least else '≤'} {limit:g}"
        rows.append([name, words, *(spread(ones.get(way, {}).get("ratios", {}).get(name), way.clock) for way in ways)])
    times = [
        f"Median {way.title}: {', '.join(f'{name} {seconds(arm, way.clock)}' for name, arm in ones[way]['arms'].items())}."
        for way in ways
        if way in ones
    ]
    return [markdown(["ratio", "target", *(way.title for way in ways)], rows), *times]


def at(files: Files, *path: str) -> dict[Way, dict]:
    """What each file holds at `path`; files that hold nothing there are left out."""
    found = {}
    for way, file in files.items():
        node = file["result"]
        for key in path:
            node = (node or {}).get(key)
        if node is not None:
            found[way] = node
    return found


def places(files: Files) -> list[tuple[str, str]]:
    """Every (dtype, rank) of any file, in order."""
    return list(dict.fromkeys((d, r) for file in files.values() for d, ranks in file["result"].items() for r in ranks))


MIXED = """Eight rows: `mixed`, each through another adapter; `one`, all through one adapter; `alone`, one row after the other, each
through its adapter; `frozen`, the base."""


def train_tables(what: str, files: Files, device: str) -> list[str]:
    parts = []
    for scenario in (PLAIN, CHECKPOINTED):
        for dtype, rank in places(files):
            if ones := at(files, dtype, rank, scenario):  # with checkpointing measured at the first rank only
                parts.append(f"{SHORT[dtype]}, rank {rank}, {scenario}:")
                parts += timed(ones, device, what, (scenario,), dtype, rank)
    return parts


def decode_tables(what: str, files: Files, device: str) -> list[str]:
    parts = []
    for dtype, rank in places(files):
        parts += [f"{SHORT[dtype]}, rank {rank}:", *timed(at(files, dtype, rank), device, what, (), dtype, rank)]
    return parts


def mixed_tables(what: str, files: Files, device: str) -> list[str]:
    return [MIXED, *decode_tables(what, files, device)]


def memory_tables(what: str, files: Files, device: str) -> list[str]:
    """MiB by arm and kind of count, and the ratios of both counts."""
    names = {"live_bytes": "alive", "saved_bytes": "saved", "packed_bytes": "packed"}
    names |= {"step_peak_bytes": "peak of a step", "step_extra_bytes": "beyond rest"}
    keys = list(names)[: 4 if device == "cuda" else 2]
    parts = ["`alive`: made by the forward and alive after it; `saved`: in the graph's saved tensors; without parameters, buffers."]
    for dtype, ranks in files[WALL]["result"].items():
        for rank, scenarios in ranks.items():
            for scenario, one in scenarios.items():
                rows = [[name, *(arm.get("failed") or mib(arm[key]) for key in keys)] for name, arm in one["arms"].items()] + [
                    [f"ratio {name}", *(f"{ratio[key]:.3f}" if key in ratio else "" for key in keys)]
                    for name, ratio in one["ratios"].items()
                ]
                parts += [f"{SHORT[dtype]}, rank {rank}, {scenario}:", markdown(["MiB", *(names[k] for k in keys)], rows)]
    return parts


def norm_tables(what: str, files: Files, device: str) -> list[str]:
    """Time, extra memory, and the error at each share of the change."""
    parts = []
    for dtype, ranks in files[WALL]["result"].items():
        for rank, sizes in ranks.items():
            for size, one in sizes.items():
                shares = list(one["errors"])
                rows = [
                    [name, seconds(arm, WALL.clock), mib(arm.get("peak_bytes"))]
                    + [f"{one['errors'][share][name]:.1e}" if name in one["errors"][share] else NOT_MEASURED for share in shares]
                    for name, arm in one["arms"].items()
                ]
                head = ["", f"median {WALL.title}", "extra MiB", *(f"error, s·B·A {share} of W" for share in shares)]
                parts += [f"{size} × {size}, {SHORT[dtype]}, rank {rank}:", markdown(head, rows)]
    return parts


def layer_tables(what: str, files: Files, device: str) -> list[str]:
    parts = []
    for dtype, ranks in files[WALL]["result"].items():
        for rank, sizes in ranks.items():
            for size, one in sizes.items():
                parts += [f"{size} × {size}, {SHORT[dtype]}, rank {rank}:", *timed({WALL: one}, device)]
    return parts


def size_tables(what: str, files: Files, device: str) -> list[str]:
    """One table a figure: ranks by sides."""
    figures = {
        "Step, dora/lora": lambda one: spread(one["ratios"].get("dora/lora"), WALL.clock),
        "Step, dora/frozen": lambda one: spread(one["ratios"].get("dora/frozen"), WALL.clock),
        "MiB kept for backward, dora − lora": lambda one: mib(one.get("extra_bytes")),
        "MiB of A, B and m": lambda one: mib(one.get("adapter_bytes")),
    }
    parts = []
    for dtype, ranks in files[WALL]["result"].items():
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
    "mixed": ("Decode of a batch of eight adapters", mixed_tables),
    "layer": ("One layer", layer_tables),
    "sizes": ("Cost against size", size_tables),
    "host": ("Host cost", host_tables),
}
"""measurement: (heading, its tables)."""
OF_A_MODEL = ("train_step", "memory", "decode")
"""What a variant has: another base or another shape of the model."""
