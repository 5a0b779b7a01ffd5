"""python benchmarks/evidence.py: the tables and figures of docs/evidence.md from benchmarks/results/; no figure by hand.

compare_*.json             compare.json of `doratune compare`; compare_llava.json also as a picture, docs/ranks.png
movement_*.json            points.json of `doratune analyze`
evaluation_cpu.json        benchmarks/evaluation.py
"""

from __future__ import annotations

import json
from pathlib import Path

from doratune.analysis.points import Line, Point, regression
from doratune.support.tables import markdown, placed

PAPER = {"full": -0.62, "lora": +0.83, "dora": -0.31}
"""Correlation of ΔD and ΔM in Fig. 2, query and value matrices."""


def compared(found: dict) -> str:
    """A grid's tables, and its facts in a line."""
    facts, environment = found["facts"], found["facts"]["environment"]
    parts = []
    for table in found["tables"]:
        parts += [markdown(table["columns"], table["rows"]), table["note"]]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    notes = [f"- {note}" for note in found["notes"]]
    machine = f"{environment['device']}, threads: {environment['threads']}"
    where = f"{facts['items']} test items; {machine}; {versions}; commit {environment['commit']}"
    return "\n\n".join([*parts, "\n".join(notes), f"{where}."])


def movement(found: dict) -> str:
    """Correlation of ΔD and ΔM by method, beside the paper's."""
    rows = []
    for run, value in found.items():
        line, points = value["line"], value["points"]
        last = [p for p in points if p["step"] == max(q["step"] for q in points)]
        means = [sum(p[key] for p in last) / len(last) for key in ("magnitude", "direction")]
        steps = sorted({p["step"] for p in points})
        method = Path(run).name.split("-")[0]
        low, high = line_of(points).interval
        cells = [method, f"{PAPER[method]:+.2f}", f"{line['correlation']:+.2f} [{low:+.2f}, {high:+.2f}]"]
        modules = sorted({p["module"] for p in points})
        cells += [", ".join(f"{m} {line_of([p for p in points if p['module'] == m]).correlation:+.2f}" for m in modules)]
        cells += [f"{line_of([p for p in points if p['layer'] > 0]).correlation:+.2f}", f"{line['slope']:+.3g}"]
        rows.append([*cells, str(line["points"]), ", ".join(map(str, steps)), *(f"{mean:.3g}" for mean in means)])
    head = [
        "method",
        "paper",
        "ours [95 % over weights]",
        "by module",
        "without layer 0",
        "slope",
        "points",
        "steps",
        "ΔM at the end",
        "ΔD at the end",
    ]
    return markdown(head, rows)


def line_of(points: list[dict]) -> Line:
    return regression(
        [Point(f"{p['layer']} {p['module']}", p["layer"], p["module"], p["step"], p["magnitude"], p["direction"]) for p in points]
    )


def evaluation(found: dict) -> str:
    """Batch 1 against batches, and items a second beside PEFT."""
    facts, result = found["facts"], found["result"]
    settings, parts = facts["settings"], []
    large = str(settings["batch_size"])
    rows = [
        [task, protocol, str(v["items"]), str(v["right"]["1"]), str(v["right"][large]), str(v["differing"]["correct"])]
        for task, protocols in result["same"].items()
        for protocol, v in protocols.items()
    ]
    head = ["task", "protocol", "items", "right, one at a time", f"right, batches of {large}", "verdicts that differ"]
    parts += [f"Scores at batch size 1 and {large}, {settings['dtype']}:", markdown(head, rows)]
    speed = result["speed"]
    rows = []
    for name, arm in speed["arms"].items():
        ratio = speed["times faster than"].get(name, {})
        times = [
            f"{ratio[c]['p50']:.2f} × ({ratio[c]['p20']:.2f} to {ratio[c]['p80']:.2f})" if ratio else ""
            for c in ("wall_s", "cpu_s")
        ]
        cells = [name, f"{arm['items_per_wall_s']:.2f}", f"{arm['items_per_cpu_s']:.2f}", *times, str(arm["right"])]
        rows.append([*cells, str(arm["answers_unlike_peft_one"])])
    head = [
        "arm",
        "items / s",
        "items / CPU s",
        "doratune is faster by, time",
        "CPU time",
        "right",
        "answers unlike PEFT's, one at a time",
    ]
    parts += [
        f"`generate`, {speed['items']} items, arms in turn chunk by chunk in one process ({settings['dtype']}):",
        markdown(head, rows),
    ]
    parts += ["`doratune` and `peft_batches` take the items in batches, `doratune_one` and `peft_one` one at a time."]
    return "\n\n".join(parts)


def tables(results: Path) -> dict[str, str]:
    """{marker: Markdown} of the files that are there."""
    made = {path.stem: compared(json.loads(path.read_text())) for path in sorted(results.glob("compare_*.json"))}
    made |= {path.stem: movement(json.loads(path.read_text())) for path in sorted(results.glob("movement_*.json"))}
    if (path := results / "evaluation_cpu.json").is_file():
        made["evaluation"] = evaluation(json.loads(path.read_text()))
    return made


def draw_ranks(found: dict, path: Path) -> None:
    """Score against rank of each method with its interval, whole and near; a method without a rank axis is a line across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart = next(curve for curve in found["curves"] if curve["x"] == "rank")
    figure, (whole, near) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes in (whole, near):
        draw_curves(axes, chart)
    ranked = [p for points in chart["series"].values() if len(points) > 1 for p in points]
    near.set_ylim(100 * min(p["low"] for p in ranked) - 0.2, 100 * max(p["high"] for p in ranked) + 0.2)
    whole.set_ylabel(f"{chart['y']}, %")
    near.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_curves(axes, chart: dict) -> None:
    """One panel of `draw_ranks`."""
    for place, (name, points) in enumerate(chart["series"].items()):
        points = sorted((p for p in points if p["x"]), key=lambda p: p["x"]) or points
        heights, colour = [100 * p["mean"] for p in points], f"C{place % 10}"
        if len(points) == 1:
            axes.axhline(heights[0], label=name, color=colour, linestyle="--", linewidth=1)
            continue
        halves = [100 * (p["high"] - p["low"]) / 2 for p in points]
        shift = 1 + 0.03 * (place - 3)  # bars of one rank beside one another
        axes.errorbar([p["x"] * shift for p in points], heights, halves, label=name, color=colour, marker="o", capsize=3)
    ranks = sorted({p["x"] for points in chart["series"].values() if len(points) > 1 for p in points})
    axes.set(xscale="log", xlabel="rank")
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def main(root: Path) -> None:
    page = root / "docs" / "evidence.md"
    text = page.read_text(encoding="utf-8")
    for name, content in tables(root / "benchmarks" / "results").items():
        text = placed(page, name, content, text)
    page.write_text(text, encoding="utf-8")
    if (path := root / "benchmarks" / "results" / "compare_llava.json").is_file():
        draw_ranks(json.loads(path.read_text()), root / "docs" / "ranks.png")


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[1])
