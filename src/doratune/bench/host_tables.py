"""The tables of host cost in docs/performance.md, from the JSON that `host.py` makes."""

from __future__ import annotations

from ..support.tables import markdown
from .tables import SHORT
from .targets import HOST_TARGETS

HEAD = (
    "Microseconds a layer: the least of all rounds, and the median; in every round the parameters have changed before the forward. "
    "Operations a layer as the dispatcher sees them, without views and allocations; host reads of the whole model."
)
COUNTED = ("forward preparing", "forward", "backward", "decode")


def host_tables(what: str, files: dict, device: str) -> list[str]:
    parts = [HEAD]
    (file,) = files.values()
    layers = file["facts"]["settings"]["attach_layers"]
    for dtype, ranks in file["result"].items():
        for rank, one in ranks.items():
            parts += [f"{SHORT[dtype]}, rank {rank}:", times(one), ratios(one, dtype, rank), counts(one), once(one, layers)]
    return parts


def times(one: dict) -> str:
    parts = list(next(iter(one["arms"].values())))
    rows = [[name, *(f"{arm[part]['min']:.1f} ({arm[part]['p50']:.1f})" for part in parts)] for name, arm in one["arms"].items()]
    return markdown(["µs a layer", *parts], rows)


def ratios(one: dict, dtype: str, rank: str) -> str:
    """Of the least times, with the median of the ratios of single rounds."""
    limits = {t.path[1:]: t.limit(dtype, rank) for t in HOST_TARGETS if t.path[0] == "ratios"}
    rows = []
    for name, ratio in one["ratios"].items():
        for part in (key.removesuffix("_min") for key in ratio if key.endswith("_min")):
            limit = limits.get((name, f"{part}_min"))
            words = "" if limit is None else f"≤ {limit:g}"
            rows.append([f"{part}, {name}", words, f"{ratio[f'{part}_min']:.3f}", f"{ratio[f'{part}_p50']:.3f}"])
    return markdown(["ratio", "target", "least times", "median of rounds"], rows)


def counts(one: dict) -> str:
    """Operations a layer with its share of what the model does once a forward, in brackets those of its own call; host reads."""
    head = ["operations a layer (in its call)", *COUNTED, "host reads of a model's forward, preparing", "and not"]
    rows = []
    for name, parts in one["operations"].items():
        reads = [str(parts[part]["host_reads"]) for part in COUNTED[:2]]
        numbers = (f"{parts[part]['a_layer']:.4g} ({parts[part]['in_the_call']})" for part in COUNTED)
        rows.append([name, *numbers, *reads])
    return markdown(head, rows)


def once(one: dict, layers: int) -> str:
    """What is paid once a process or a model."""
    attach = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in one["attach_s"].items())
    imports = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in one["import_s"].items())
    return f"Attaching to {layers} such layers: {attach}. The package beyond torch: {imports}."
