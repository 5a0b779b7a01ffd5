"""Items of a user's own task: the formats of training data, asked as training asks, and the metrics that an answer is held against.

    {"messages": […]}  {"instruction": …, "output": …}  {"prompt": …, "completion": …}  {"question": …, "answer": …}  ShareGPT's

The last answer of an item is the right one. `choices` (a list, the right answer among them, or `answer` its number or letter) make
it a question with choices; `pattern` is what the metric regex looks for.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..data import DataSettings
from ..data.encode import encode_one, prompt_ids
from ..data.formats import DataFormat, format_named, format_of, unknown_item
from ..data.image_sources import ImageSource
from ..data.loading import renamed
from ..errors import UserError
from .metrics import METRICS, check_metrics, function_at, valid_pattern

DEFAULT = ("exact_match", "f1")
ANSWER_KEYS = ("output", "completion")
"""What formats call an answer that an item has under `answer`."""


@dataclass(frozen=True)
class OwnTask:
    """How the items of a user's own task are read and scored.

    Attributes:
        metrics: by name; the first decides whether an answer is right. (): those of `DEFAULT`, or regex where items have a pattern.
        pattern: of the metric regex, for items without their own. function: FILE.py:NAME of the metric function, which is run.
        reading: how items become text. prompt: instead of `reading.prompt`; auto: template where the tokenizer has one.
    """

    metrics: tuple[str, ...] = ()
    pattern: str | None = None
    function: str | None = None
    reading: DataSettings = dataclasses.field(default_factory=DataSettings)
    prompt: Literal["auto", "plain", "template"] = "auto"

    @property
    def forced(self) -> bool:
        """Is every item to be read as one of a user's own task, whatever published kind it looks like?"""
        return bool(self.metrics) or self.reading.data_format != "auto"


class OwnItem(dict):
    """An item with its format, its right answer, and the metrics of its task; `source` is the file that it stands in.

    Raises:
        UserError: it is of no format, has no right answer, choices that hold none, or an image that its format does not read.
    """

    def __init__(self, raw: Mapping, task: OwnTask, metrics: dict[str, Callable], where: str, source: str = ""):
        super().__init__(raw)
        self.task, self.metrics, self.where, self.source = task, metrics, where, source
        self.offered = offered(raw, where)
        if self.offered and "answer" in raw:
            self["answer"] = right_choice(raw["answer"], self.offered, where)
        self.kind = self._format()
        self.kind.check(self, where, task.reading)
        if unseen := self.kind.unseen(self):
            raise UserError(f"{where} {unseen[0]}")
        self.gold = self.kind.gold(self, task.reading).strip()
        if self.offered:
            self.gold = right_choice(self.gold, self.offered, where)
        if "regex" in metrics:
            pattern = self.get("pattern", task.pattern)
            if pattern is None:
                raise UserError(f"{where} has no 'pattern' for the metric regex; give one there, or --pattern for all")
            self["pattern"] = valid_pattern(pattern, where)

    def _format(self) -> DataFormat:
        """The format of the item, whose answer may also stand under `answer`."""
        named = self.task.reading.data_format
        if named == "auto" and format_of(self) is None and isinstance(self.get("answer"), str):
            for key in ANSWER_KEYS:
                if format_of({**self, key: self["answer"]}) is not None:
                    self[key] = self["answer"]
                    break
        kind = format_of(self) if named == "auto" else format_named(named)
        if kind is None:
            raise UserError(unknown_item(self, self.where))
        return kind

    def sources(self) -> list[ImageSource]:
        """The images of the prompt, in order."""
        return self.kind.sources(self, self.task.reading)

    def tokens(self, tokenizer) -> list[int]:
        """The prompt: all that stands in front of the last answer."""
        reading = self.task.reading
        if self.task.prompt != "auto" or getattr(tokenizer, "chat_template", None):
            prompt = "template" if self.task.prompt == "auto" else self.task.prompt
            reading = dataclasses.replace(reading, prompt=prompt)
        example = encode_one(self, lambda item, t: self.kind.encode(item, t, reading), tokenizer)
        return prompt_ids(example, tokenizer)


def offered(item: Mapping, where: str) -> tuple[str, ...]:
    """The choices of an item; () where it offers none."""
    choices = item.get("choices")
    if choices is None:
        return ()
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UserError(f"{where} has no list of texts under 'choices'")
    choices = [choice.strip() for choice in choices]
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise UserError(f"{where} has no two or more different texts under 'choices'")
    return tuple(choices)


def right_choice(answer, choices: Sequence[str], where: str) -> str:
    """The choice that an answer means: its text, its letter, or its number from 0 on."""
    letters = dict(zip(string.ascii_uppercase, choices))
    if isinstance(answer, str) and answer.strip() in choices:
        return answer.strip()
    if isinstance(answer, str) and answer.strip() in letters:
        return letters[answer.strip()]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    raise UserError(f"{where}: the answer is {answer!r}, which is none of its {len(choices)} choices, nor their letter or number")


def is_own(items: Sequence[Mapping], task: OwnTask, published: Callable[[Mapping], bool]) -> bool:
    """Are the items of a file those of a user's own task, all of them?

    Args:
        published: can an item be scored as one of a published kind?
    """
    if task.forced or all("choices" in item or "pattern" in item for item in items):
        return True
    meant = any("instruction" in item and "answer" in item for item in items)
    return not meant and not all(map(published, items)) and all(format_of(item) is not None for item in items)


def own_items(items: Sequence[Mapping], task: OwnTask, name: str) -> list[OwnItem]:
    """The items of a file, read.

    Raises:
        UserError: an item that has no right answer, or is of no format, with its number; a metric that cannot be used.
    """
    names = task.metrics or (("regex",) if all("pattern" in item for item in items) else DEFAULT)
    check_metrics(names, task.function)
    metrics = {metric: METRICS.get(metric) or function_at(task.function) for metric in names}
    places = (getattr(item, "where", f"{name}: item {number}") for number, item in enumerate(items, 1))
    return [
        OwnItem(_renamed(item, task.reading), task, metrics, where, getattr(item, "source", ""))
        for item, where in zip(items, places)
    ]


def _renamed(item: Mapping, reading: DataSettings) -> dict:
    return dict(renamed(item, reading.columns)) if reading.columns else dict(item)
