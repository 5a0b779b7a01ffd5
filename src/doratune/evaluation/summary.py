"""From item records to figures: accuracy with standard error, unparsable share, chance, majority, the published figure; a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..support.tables import aligned
from .kinds import kind_of
from .published import published
from .tasks import chance, kinds_of, majority


def summarize(name: str, items: Sequence[dict], records: Sequence[dict], protocol: str, seconds: float) -> dict:
    """The figures of one task."""
    n, right = len(records), sum(r["correct"] for r in records)
    scores = [r.get("score", float(r["correct"])) for r in records]
    accuracy = math.fsum(scores) / n
    result = {
        "task": name,
        "protocol": protocol,
        "right": right,
        "total": n,
        "accuracy": accuracy,
        "standard_error": math.sqrt(max(0.0, math.fsum(s * s for s in scores) / n - accuracy**2) / n),
        "unparsable": sum(r["answer"] is None for r in records) / n,
        "chance": chance(items),
        "majority": majority(items),
        "seconds": seconds,
        "items_per_second": n / max(seconds, 1e-9),
    }
    if protocol == "likelihood":
        result["accuracy_normalized"] = sum(r["correct_normalized"] for r in records) / n
    for kind in kinds_of(items):
        own = [place for place, item in enumerate(items) if kind_of(item) is kind]
        result |= kind.figures([items[place] for place in own], [records[place] for place in own])
    return result


def add_published(result: dict, model: str, method: str | None, rank: int | None) -> dict:
    """Put published figures and the difference from the first beside ours, where there are any; not for `likelihood`."""
    figures = published(model, method, rank, result["task"]) if result["protocol"] != "likelihood" else []
    if figures:
        listed = [{"accuracy": f.accuracy, "source": f.source} for f in figures]
        result |= {"published": listed, "difference": result["accuracy"] - figures[0].accuracy}
    return result


def overall(results: Sequence[dict]) -> dict | None:
    """Macro average over tasks, as the paper reports it, for one protocol; None for a single task."""
    if len(results) < 2:
        return None
    keys = ("accuracy", "unparsable", "chance", "majority")
    mean = {key: sum(r[key] for r in results) / len(results) for key in keys}
    error = math.sqrt(sum(r["standard_error"] ** 2 for r in results)) / len(results)
    sums = {key: sum(r[key] for r in results) for key in ("right", "total", "seconds")}
    speed = sums["total"] / max(sums["seconds"], 1e-9)
    facts = {"task": "average", "protocol": results[0]["protocol"], "items_per_second": speed}
    return facts | mean | sums | {"standard_error": error}


SHARES = {
    "circular_accuracy": "right in every rotation of the options",
    "accuracy_with_image": "accuracy of the items with an image",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "yes_share": "share of yes",
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
}
"""Figures of single kinds of items, and what a table calls them."""


def own_shares(result: dict) -> list[str]:
    """The figures that a task's kind of items has beyond those of every kind, with their names."""
    known = ((words, result.get(key)) for key, words in SHARES.items())
    return [f"{words} {100 * share:.1f} %" for words, share in known if isinstance(share, int | float)]


def own_figures(result: dict) -> str:
    """One line about `own_shares`; empty where there are none."""
    parts = own_shares(result)
    return f"{result['task']}: {', '.join(parts)}" if parts else ""


def table(results: Sequence[dict], peak_bytes: int | None) -> str:
    """A plain text table, one line a task and protocol."""
    head = [
        "task",
        "protocol",
        "right/total",
        "accuracy",
        "unparsable",
        "chance",
        "majority",
        "s",
        "items/s",
        "published",
    ]
    rows = []
    for r in results:
        figure = f"{100 * r['published'][0]['accuracy']:.1f} ({100 * r['difference']:+.1f})" if "published" in r else "-"
        shown = f"{100 * r['accuracy']:.1f} ± {100 * r['standard_error']:.1f} %"
        counts = [f"{100 * r[key]:.1f} %" for key in ("unparsable", "chance", "majority")]
        speed = [f"{r['seconds']:.0f}", f"{r['items_per_second']:.1f}"]
        rows.append([r["task"], r["protocol"], f"{r['right']}/{r['total']}", shown, *counts, *speed, figure])
    lines = aligned(head, rows)
    for r in results:
        for other in r.get("published", ())[1:]:
            gap = 100 * (r["accuracy"] - other["accuracy"])
            lines.append(f"{r['task']}: {100 * other['accuracy']:.1f} % in {other['source']} ({gap:+.1f})")
    for r in results:
        shown = [f"{name} {100 * m['mean']:.1f} ± {100 * m['standard_error']:.1f} %" for name, m in r.get("metrics", {}).items()]
        lines += [f"{r['task']} {r['protocol']}: {', '.join(shown)}"] if shown else []
    lines += [line for r in results if (line := own_figures(r))]
    if peak_bytes is not None:
        lines.append(f"peak memory {peak_bytes / 2**30:.2f} GiB")
    return "\n".join(lines)
