"""The arithmetic run of docs/arithmetic.md: test sets without what the training file holds already, and the page's tables.

    python benchmarks/arithmetic.py held_out data/math            data/math/held_out/TASK.json, and how much of each was left out
    python benchmarks/arithmetic.py record runs/compare_arithmetic benchmarks/results/arithmetic.json of a grid's finished cells
    python benchmarks/arithmetic.py tables                        docs/arithmetic.md from that file, between markers

LLM-Adapters' arithmetic training file holds four fifths of the five test sets' own problems, so a score on a whole test file is
mostly one of memory. Two problems are the same where their words and digits are, whatever case, spaces and punctuation.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAINING = "train.json"
FACTS = ("trainable", "total", "seconds", "cpu_seconds", "eval_loss", "tokens_per_second")


def words(text: str) -> str:
    """What of a problem is compared."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def held_out(folder: Path) -> list[tuple[str, int, int]]:
    """(task, items, items that the training file does not hold), with the latter written to folder/held_out/TASK.json."""
    known = {words(item["instruction"]) for item in json.loads((folder / TRAINING).read_text(encoding="utf-8"))}
    counts, output = [], folder / "held_out"
    output.mkdir(exist_ok=True)
    for path in sorted(folder.glob("*_test.json")):
        items = json.loads(path.read_text(encoding="utf-8"))
        fresh = [item for item in items if words(item["instruction"]) not in known]
        task = path.name.removesuffix("_test.json")
        (output / f"{task}.json").write_text(json.dumps(fresh, ensure_ascii=False, indent=1), encoding="utf-8")
        counts.append((task, len(items), len(fresh)))
    return counts


def marks(scores: Path, task: str) -> str:
    """A digit for each problem of a task, 1 where it was answered right, so that runs can be compared problem by problem."""
    path = scores / f"{task}.generate.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is missing, which holds the answers behind {scores / 'results.json'}; copy the whole folder of the run")
    lines = path.read_text(encoding="utf-8").splitlines()
    return "".join(str(int(json.loads(line)["correct"])) for line in lines)


def record(run: Path) -> dict:
    """The scores of the base model and of every finished cell, and what each cost."""
    arms = {}
    for folder in [run / "base", *sorted((run / "cells").glob("*"))]:
        scores = folder / "results.json" if folder.name == "base" else folder / "scores" / "after" / "results.json"
        metrics = json.loads((folder / "metrics.json").read_text()) if (folder / "metrics.json").is_file() else {}
        if not scores.is_file() or (folder.name != "base" and not metrics):
            continue
        results = json.loads(scores.read_text())["results"]
        kept = ("right", "total", "unparsable", "majority", "seconds")
        tasks = {r["task"]: {key: r[key] for key in kept} | {"marks": marks(scores.parent, r["task"])} for r in results}
        facts = {key: metrics.get(key) for key in FACTS} if metrics else {}
        arms[folder.name] = {"tasks": tasks} | facts | {"environment": metrics.get("environment")}
    return arms


def table(arms: dict) -> str:
    """A line a run: right of total in each task with the 95 % interval of Wilson, and all of them together."""
    from doratune.report.scores import wilson
    from doratune.support.tables import markdown

    names = list(next(iter(arms.values()))["tasks"])
    rows = []
    for arm, scores in arms.items():
        pairs = [(scores["tasks"][name]["right"], scores["tasks"][name]["total"]) for name in names]
        pairs.append(tuple(map(sum, zip(*pairs))))
        cells = [
            f"{right}/{total} ({100 * low:.0f} – {100 * high:.0f} %)"
            for right, total in pairs
            for low, high in [wilson(right, total)]
        ]
        lost = sum(t["unparsable"] * t["total"] for t in scores["tasks"].values()) / pairs[-1][1]
        loss, seconds = scores.get("eval_loss"), scores.get("cpu_seconds")
        rest = [f"{100 * lost:.0f} %", "-" if loss is None else f"{loss:.3f}", "-" if seconds is None else f"{seconds:.0f} s"]
        trained = scores.get("trainable")
        rows.append([arm, "-" if trained is None else f"{trained:,}", *cells, *rest])
    head = ["run", "trained", *names, "all", "unparsable", "loss on held-out problems", "CPU time of training"]
    return markdown(head, rows)


def by_method(arms: dict) -> dict[str, list[dict]]:
    """The runs of each method, in the order of their seeds."""
    groups: dict[str, list[dict]] = {}
    for arm, scores in arms.items():
        groups.setdefault(re.sub(r"-s\d+$", "", arm), []).append(scores)
    return groups


def over_seeds_table(arms: dict) -> str:
    """A line a method of several seeds: mean of right answers, and of the loss, with Student's t interval; nothing of one seed."""
    from doratune.comparison.statistics import over_seeds
    from doratune.support.tables import markdown

    rows = []
    for name, runs in by_method(arms).items():
        if len(runs) > 1:
            sums = [tuple(map(sum, zip(*((t["right"], t["total"]) for t in run["tasks"].values())))) for run in runs]
            right = over_seeds([right / total for right, total in sums])
            loss = over_seeds([run["eval_loss"] for run in runs])
            cells = [f"{100 * right.mean:.1f} ± {100 * right.half:.1f} %", f"{loss.mean:.3f} ± {loss.half:.3f}"]
            rows.append([name, str(len(runs)), *cells])
    return markdown(["method", "seeds", "all problems", "loss on held-out problems"], rows) if rows else ""


def pairs_table(arms: dict) -> str:
    """A line for each two methods of as many seeds, and the base with each: paired differences as `doratune compare` has them.

    The base has no seed and counts once for each; it has no loss. Nothing where no method has several seeds.
    """
    import numpy as np

    from doratune.comparison.statistics import holm, paired_bootstrap, paired_difference
    from doratune.support.tables import markdown

    groups = by_method(arms)
    seeds = max(map(len, groups.values()))
    runs = {name: of_one * seeds if name == "base" else of_one for name, of_one in groups.items()}
    right = {
        name: {task: np.array([[int(mark) for mark in run["tasks"][task]["marks"]] for run in group]) for task in group[0]["tasks"]}
        for name, group in runs.items()
        if len(group) == seeds > 1
    }
    names = [(a, b) for i, b in enumerate(right) for a in list(right)[i + 1 :]]
    differences = [paired_bootstrap(right[a], right[b]) for a, b in names]
    rows = []
    for (a, b), d, p in zip(names, differences, holm([d.p for d in differences])):
        interval = f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"
        figures = [f"{100 * d.mean:+.1f}", interval, f"{d.p:.3f}", f"{p:.3f}", f"{100 * d.visible():.1f}"]
        losses, loss = [[run.get("eval_loss") for run in runs[name]] for name in (a, b)], "-"
        if None not in (*losses[0], *losses[1]):
            of_loss = paired_difference(*losses)
            loss = f"{of_loss.mean:+.3f} ({of_loss.low:+.3f} to {of_loss.high:+.3f})"
        rows.append([f"{a} - {b}", *figures, "shown" if p < 0.05 else "not shown", loss])
    head = ["difference", "points, mean of the files", "95 % interval", "p", "p, Holm", "visible alone", "verdict"]
    head.append("loss, paired by seed")
    return markdown(head, rows) if rows else ""


def main(words: list[str]) -> None:
    from doratune.support.tables import placed

    page, results = ROOT / "docs" / "arithmetic.md", ROOT / "benchmarks" / "results" / "arithmetic.json"
    if words[:1] == ["held_out"] and len(words) == 2:
        for task, total, fresh in held_out(Path(words[1])):
            print(f"{task}: {fresh} of {total} problems are not in {TRAINING}")
    elif words[:1] == ["record"] and len(words) == 2:
        if not (arms := record(Path(words[1]))):
            sys.exit(f"{words[1]} holds no scores of a base model or of a finished cell; give the output of doratune compare")
        results.write_text(json.dumps(arms, indent=1) + "\n", encoding="utf-8")
    elif words == ["tables"]:
        arms = json.loads(results.read_text(encoding="utf-8"))
        parts = [text for text in (table(arms), over_seeds_table(arms), pairs_table(arms)) if text]
        page.write_text(placed(page, "scores", "\n\n".join(parts), page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
