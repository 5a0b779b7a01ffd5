"""Tasks by name or file, chance and majority level. What an item is, and when an answer is right: `kinds/`.

Named tasks are those of the published data: eight commonsense tasks, five arithmetic test sets, Orca-Math's held-out
problems, and `demo`, the demonstration's test half. NAME:PLACE is a benchmark read from its published files (`benchmarks/`).
A file may hold items of several kinds; those that are of no published kind are a user's own, in a format of training data
(`own_items.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data import DEMO, facts, published
from ..data.files import read_examples
from ..data.image_sources import folders_of
from ..errors import UserError, near_misses
from .benchmarks import benchmark_items, benchmark_of, benchmarks
from .kinds import TaskKind, kind_of, kinds
from .own_items import OwnTask, is_own, own_items
from .protocols import PROTOCOLS

NAMES = tuple(task for kind in kinds() for task in kind.tasks)
"""The published tasks."""


def load_task(task: str, mirror: str | None = None, limit: int | None = None, own: OwnTask | None = None) -> tuple[str, list[dict]]:
    """(name, items) of a task by name, of `demo` (the demonstration's test half), of a benchmark's folder (`vqav2:FOLDER`), or of a
    file.

    Args:
        own: how items of a user's own task are read; default: OwnTask().

    Raises:
        UserError: unknown task, malformed file, or an item without a question, or whose answer no kind of task accepts.
    """
    if (benchmark := benchmark_items(task)) is not None:
        name, items = benchmark
        return name, _checked(items[:limit], task)
    path = Path(task)
    if task == "mt_bench":
        raise UserError("mt_bench is judged, not scored against answers; use doratune evaluate --task mt_bench by itself")
    if task == DEMO:
        return DEMO, facts.items("test")[:limit]
    if task in published.HUB_PARTS and task in NAMES:
        return task, published.hub_part(task)[:limit]
    if task in NAMES:
        name, path = task, published.fetch(task, **({"base_url": mirror} if mirror else {}))
    elif path.suffix in (".json", ".jsonl") or path.exists():
        name = path.parent.name if path.stem == "test" and path.parent.name else path.stem
    else:
        raise UserError(
            f"unknown task {task!r}{near_misses(task, NAMES)}; give {', '.join(NAMES)}, {DEMO}, a .json file, or NAME:FOLDER of "
            f"{', '.join(benchmarks())}"
        )
    items, own = read_examples(path)[:limit], own or OwnTask()
    if task not in NAMES and is_own(items, own, lambda item: _problem(item) is None):
        return name, own_items(items, own, str(path))
    return name, _checked([_placed(item, n, path, own.reading.images) for n, item in enumerate(items, 1)], str(path))


def _placed(item: dict, number: int, path: Path, images: str | None) -> dict:
    """The item; of one with an image, also its place, and the folders in which the image may lie.

    images: the folder of the settings, where they name one."""
    if "image" not in item:
        return item
    folders = folders_of(images, str(path)) + ([] if images else [str(path.parent / "images")])
    return dict(item) | {"where": f"{path}: item {number}", "image_folders": folders}


def _checked(items: list[dict], where: str) -> list[dict]:
    """The items, each of which can be scored.

    Raises:
        UserError: one cannot.
    """
    for number, item in enumerate(items, 1):
        if problem := _problem(item):
            raise UserError(f"{where}: item {number}{problem}")
    return items


def _problem(item: Mapping) -> str | None:
    """Why an item cannot be scored; None where it can."""
    kind = kind_of(item)
    if kind is not None:
        return kind.problem(item)
    for key in ("question", "instruction"):
        if key == "instruction" or key in item:
            if not isinstance(item.get(key), str) or not item[key].strip():
                return f" has no text under {key!r}"
            break
    return f": answer is {item.get('answer')!r}, which no task's pattern accepts; for free answers give --metrics exact_match f1"


def protocols_for(items: Sequence[Mapping], protocols: Sequence[str]) -> tuple[str, ...]:
    """Those of the protocols by which every item of a task can be scored."""
    present = {kind_of(item) for item in items}
    return tuple(p for p in protocols if all(kind is not None and p in kind.protocols for kind in present))


def protocols_of_task(task: str) -> tuple[str, ...]:
    """The protocols that a named task or a file on this machine can be scored by; all of them where that cannot be told yet."""
    for kind in kinds():
        if task in kind.tasks:
            return kind.protocols
    return protocols_for(load_task(task)[1], PROTOCOLS) if Path(task).is_file() or benchmark_of(task) else PROTOCOLS


def kinds_of(items: Sequence[Mapping]) -> tuple[TaskKind, ...]:
    """The kinds of a task's items, each once."""
    present = {kind_of(item) for item in items}
    return tuple(kind for kind in kinds() if kind in present)


def chance(items: Sequence[Mapping]) -> float:
    """Accuracy of guessing: mean of 1 / number of choices; a free answer is not guessed."""
    return sum(kind_of(item).chance(item) for item in items) / len(items)


def majority(items: Sequence[Mapping]) -> float:
    """Accuracy of always giving the most frequent answer of each kind of item."""
    groups: dict[object, list[Mapping]] = {}
    for item in items:
        groups.setdefault(kind_of(item).group(item), []).append(item)
    total = 0.0
    for part in groups.values():
        kind = kind_of(part[0])
        answer = Counter(kind.gold(item) for item in part).most_common(1)[0][0]
        total += sum(kind.score(answer, item) for item in part)
    return total / len(items)
