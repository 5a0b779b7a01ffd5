"""Sample outputs before and after training: items whose verdict changed first, then the others.

What all prompts of a task have in common (the template) is shown once; an item's image stands beside it. Cost: the item
files are read whole, one at a time.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..data.images import open_image
from ..errors import UserError
from .read import Run, Warn, read_items

SHOWN = 6
PIXELS = 240
"""Height of an image on the page, at most; it may be three times as wide, as a row of pictures is."""
KINDS = {
    (False, True): "learned",
    (True, False): "lost",
    (False, False): "wrong both times",
    (True, True): "right both times",
    (None, False): "wrong",
    (None, True): "right",
}
"""(right before, right after) → what to call it, in the order of interest; None: the base model was not scored."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    gold: str
    before: str | None
    after: str
    kind: str
    right: tuple[bool | None, bool]
    image: str | None = None
    """The path of the item's image; on the page, the image itself."""


@dataclass(frozen=True)
class SampleSet:
    """A few items of one task; `counts` are over all of them, `frame` is what every prompt starts and ends with."""

    run: str
    task: str
    protocol: str
    counts: dict[str, int]
    frame: tuple[str, str]
    samples: list[Sample]


def sample_sets(runs: Sequence[Run], warn: Warn) -> list[SampleSet]:
    """One set a run and task, of the protocol `generate` where there is one: there the model speaks for itself."""
    all_sets = []
    for run in runs:
        for task in dict.fromkeys(r["task"] for r in run.after.results):
            protocols = sorted({r["protocol"] for r in run.after.results if r["task"] == task})
            sets = (_sample_set(run, task, protocol, warn) for protocol in protocols)
            all_sets += [s for s in sets if s is not None][:1]
    return all_sets


@dataclass(frozen=True)
class StepAnswer:
    """What came of a prompt at a step: a text, or an image for the page."""

    step: int
    text: str = ""
    image: str | None = None


def answers_on_the_way(run: Run, warn: Warn) -> list[tuple[str, list[StepAnswer]]]:
    """(prompt, answers) of `sample_prompts`, as metrics.json has them; what is none of them is left out."""
    prompts: dict[str, list[StepAnswer]] = {}
    rows = run.metrics.get("samples")
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not isinstance(row.get("prompt"), str):
            continue
        if isinstance(row.get("output"), str):
            prompts.setdefault(row["prompt"], []).append(StepAnswer(row["step"], row["output"]))
        elif isinstance(row.get("image"), str) and (shown := picture(_of_run(run, row["image"]), warn)):
            prompts.setdefault(row["prompt"], []).append(StepAnswer(row["step"], image=shown))
    return list(prompts.items())


def _of_run(run: Run, name: str) -> str | None:
    """The path of an image that lies in the run's folder; None for any other: metrics.json may be somebody else's."""
    path = os.path.realpath(run.folder / name)
    return path if path.startswith(os.path.realpath(run.folder) + os.sep) else None


def _sample_set(run: Run, task: str, protocol: str, warn: Warn) -> SampleSet | None:
    after = read_items(run.after.folder, task, protocol, warn)
    before = {(item["prompt"], item.get("image")): item for item in read_items(run.before.folder, task, protocol, warn)}
    if not after:
        return None
    start, end = _frame([item["prompt"] for item in after])
    by_kind: dict[str, list[Sample]] = {kind: [] for kind in KINDS.values()}
    for item in after:
        old = before.get((item["prompt"], item.get("image")))
        right = (bool(old.get("correct")) if old else None, bool(item.get("correct")))
        prompt = item["prompt"][len(start) : len(item["prompt"]) - len(end)]
        sample = Sample(
            prompt, item["gold"], old["output"] if old else None, item["output"], KINDS[right], right, item.get("image")
        )
        by_kind[sample.kind].append(sample)
    counts = {kind: len(samples) for kind, samples in by_kind.items() if samples}
    chosen = [replace(sample, image=picture(_placed(sample.image, run), warn)) for sample in _chosen(list(by_kind.values()))]
    return SampleSet(run.name, task, protocol, counts, (start, end), chosen)


def _placed(image: str | None, run: Run) -> str | None:
    """The path of a sample's image, which may lie beside the records."""
    beside = run.after.folder / image if isinstance(image, str) and run.after.folder else None
    return str(beside) if beside is not None and beside.is_file() else image


def picture(place: str | None, warn: Warn) -> str | None:
    """The image as a small data URI; None where there is none, or it cannot be read (any more), which is said."""
    if not isinstance(place, str):
        return None
    try:
        image = open_image(place)
    except (UserError, ImportError) as error:
        warn(f"{place} is not shown beside its sample: {str(error).removeprefix(place).lstrip(': ')}")
        return None
    image.thumbnail((3 * PIXELS, PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _chosen(kinds: list[list[Sample]]) -> list[Sample]:
    """Changes of both kinds, half each where there are enough; then the others."""
    learned, lost, *others = kinds
    half = SHOWN // 2
    changed = learned[: max(half, SHOWN - len(lost))] + lost[: max(half, SHOWN - len(learned))]
    return (changed + [sample for samples in others for sample in samples])[:SHOWN]


def _frame(prompts: list[str]) -> tuple[str, str]:
    """What all prompts start and end with, in whole lines; nothing for a single prompt."""
    if len(set(prompts)) < 2:
        return "", ""
    start = _common_start(prompts)
    start = start[: start.rfind("\n") + 1]
    rest = [prompt[len(start) :] for prompt in prompts]
    end = _common_start([prompt[::-1] for prompt in rest])[::-1]
    return start, end[end.find("\n") :] if "\n" in end else ""


def _common_start(texts: list[str]) -> str:
    """What all texts start with: the first and the last in order differ soonest."""
    first, last = min(texts), max(texts)
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[:same]
