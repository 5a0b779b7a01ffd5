"""Figures of what was written about images and video, by the task's published rule.

    soft       VQA's soft accuracy (`vqa.py`); where fewer than four people answered, any of their answers
    exact      the text itself, but for case, space and a full stop
    caption    CIDEr (`captions.py`), of all captions of the task together; 1.0 is what is published as 100

The accuracy of a task is the mean of its items' scores, so that the average over tasks is that of the paper's Tables 2 and 3.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ..data.visual_tasks import VisualItem, tasks
from .captions import cider
from .kinds.phrase import plain
from .vqa import ENOUGH, most_frequent, normalized, soft_score


def figures_of(items: Sequence[VisualItem], texts: Sequence[str]) -> tuple[dict, list[dict]]:
    """(figures of a task, a record for each item): right, total, accuracy with standard error, unparsable, chance, majority, and of
    captions `cider`."""
    scores = _scores(items, texts)
    records = [_record(item, text, score) for item, text, score in zip(items, texts, scores)]
    n, mean = len(items), math.fsum(scores) / len(items)
    figures = {
        "right": sum(record["correct"] for record in records),
        "total": n,
        "accuracy": mean,
        "standard_error": math.sqrt(max(0.0, math.fsum(score * score for score in scores) / n - mean**2) / n),
        "unparsable": sum(record["answer"] is None for record in records) / n,
        "chance": math.fsum(item.chance for item in items) / n,
        "majority": _majority(items),
    }
    described = [score for item, score in zip(items, scores) if tasks()[item.task].scored == "caption"]
    return figures | ({"cider": math.fsum(described) / len(described)} if described else {}), records


def _record(item: VisualItem, text: str, score: float) -> dict:
    """One line of the file of records; `correct` of a caption is one that people gave word for word."""
    right = _answered(text, item) > 1 - 1e-9
    record = {"prompt": item.prompt, "gold": _gold(item), "output": text, "answer": text or None, "correct": right, "score": score}
    return record if item.sights[0].video else record | {"image": item.sights[0].path}


def _scores(items: Sequence[VisualItem], texts: Sequence[str]) -> list[float]:
    """Of each item; captions of all items together, because their words' weights come from all."""
    scores = [_answered(text, item) for item, text in zip(items, texts)]
    described = [i for i, item in enumerate(items) if tasks()[item.task].scored == "caption"]
    if described:
        for i, score in zip(described, cider([texts[i] for i in described], [items[i].answers for i in described])):
            scores[i] = score
    return scores


def _answered(text: str, item: VisualItem) -> float:
    """Of a text as an answer, 0 to 1."""
    if tasks()[item.task].scored == "soft":
        if len(item.answers) > ENOUGH:
            return soft_score(text, item.answers)
        return float(normalized(text) in map(normalized, item.answers))
    return float(plain(text) in map(plain, item.answers))


def _gold(item: VisualItem) -> str:
    return most_frequent(item.answers) if tasks()[item.task].scored == "soft" else plain(item.answers[0])


def _majority(items: Sequence[VisualItem]) -> float:
    """The score of each task's most frequent answer; 0 for captions."""
    groups: dict[str, list[VisualItem]] = {}
    for item in items:
        if tasks()[item.task].scored != "caption":
            groups.setdefault(item.task, []).append(item)
    answers = {task: Counter(map(_gold, group)).most_common(1)[0][0] for task, group in groups.items()}
    return math.fsum(_answered(answers[task], item) for task, group in groups.items() for item in group) / len(items)
