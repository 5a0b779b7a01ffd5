"""The eight commonsense tasks: which answers each allows, how an answer is found in a text, chance and majority level.

The pattern is the paper's: the first allowed answer anywhere in the output; none means unparsable, which counts as wrong.
A file of mixed items is scored as well: each item's allowed answers follow from its gold answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data import DEMO, facts, published
from ..data.files import read_examples
from ..errors import UserError, near_misses

ANSWERS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
}
"""Task → the answers that its published pattern accepts."""

_FAMILIES = tuple(dict.fromkeys(ANSWERS.values()))
_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")


def load_task(task: str, mirror: str | None = None, limit: int | None = None) -> tuple[str, list[dict]]:
    """(name, items) of a task by name, of `demo` (the demonstration's test half), or of a .json/.jsonl file in the tasks' format.

    Raises:
        UserError: unknown task, malformed file, or an item without instruction, or whose answer no pattern accepts.
    """
    path = Path(task)
    if task == DEMO:
        return DEMO, facts.items("test")[:limit]
    if task in ANSWERS:
        name, path = task, published.fetch(task, **({"base_url": mirror} if mirror else {}))
    elif path.suffix in (".json", ".jsonl") or path.exists():
        name = path.parent.name if path.stem == "test" and path.parent.name else path.stem
    else:
        raise UserError(f"unknown task {task!r}{near_misses(task, ANSWERS)}; give {', '.join(ANSWERS)}, {DEMO} or a .json file")
    items = read_examples(path)[:limit]
    for number, item in enumerate(items, 1):
        where = f"{path}: item {number}"
        if not isinstance(item.get("instruction"), str) or not item["instruction"].strip():
            raise UserError(f"{where} has no text under 'instruction'")
        if family(item) is None:
            raise UserError(f"{where}: answer is {item.get('answer')!r}, which no task's pattern accepts")
    return name, items


def family(item: Mapping) -> tuple[str, ...] | None:
    """The answers that the pattern of this item's task accepts."""
    return next((answers for answers in _FAMILIES if item.get("answer") in answers), None)


def choices(item: Mapping) -> tuple[str, ...]:
    """The answers that this item offers: what its "Answer format: a/b/c" lists, else all of its task's."""
    if match := _FORMAT.search(item["instruction"]):
        listed = tuple(match[1].split("/"))
        if item["answer"] in listed and set(listed) <= set(family(item)):
            return listed
    return family(item)


def first_answer(text: str, item: Mapping) -> str | None:
    """The first allowed answer in a text, as the published scripts find it; None where there is none."""
    match = re.search("|".join(family(item)), text)
    return match[0] if match else None


def chance(items: Sequence[Mapping]) -> float:
    """Accuracy of guessing: mean of 1 / number of choices."""
    return sum(1 / len(choices(item)) for item in items) / len(items)


def majority(items: Sequence[Mapping]) -> float:
    """Accuracy of always giving the most frequent answer of each kind of item."""
    kinds: dict[tuple, Counter] = {}
    for item in items:
        kinds.setdefault(family(item), Counter())[item["answer"]] += 1
    return sum(max(counts.values()) for counts in kinds.values()) / len(items)
