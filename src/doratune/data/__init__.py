"""Training data by file, hub id or published name; one file a format.

files.py               JSON and JSONL files of examples
instruction.py         the format of instructions: instruction, input, output
questions.py           the format of questions: question, answer
chat.py                the format of chats: messages, by the tokenizer's template
published.py           the paper's data sets by name
published_prompts.py   the published scripts' prompts, to replay them
facts.py               the demonstration's facts
encode.py              answer and prompt, the length limit, batches
limits.py              tokens and lengths against what a model has
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UserError, listed
from ..support.values import check_choice
from . import chat, facts, instruction, published, published_prompts, questions
from .files import Item, read_examples

FORMATS = {"instruction": instruction, "chat": chat, "questions": questions}
DEMO = "demo"
"""The items of `facts`: they come with the package."""


def encoder(kind, prompt: str = "plain"):
    """How items of a format module become tokens, in the prompt of a recipe.

    Raises:
        UserError: the published prompt for items that are no instructions.
    """
    if prompt == "plain":
        return kind.encode
    if kind is not instruction:
        raise UserError("prompt is published, which is for instruction data; chat data has the tokenizer's template: drop it")
    return published_prompts.encode


def load_items(data: str | list[str], mirror: str | None = None, data_format: str = "auto", unusable: list[str] | None = None):
    """(items, format module) of one or several sources, in order; every item checked.

    A source is a local .json/.jsonl file, a published name, `demo` (the demonstration's training half) or a hub id;
    `source[:N]` takes its first N items.

    Args:
        unusable: takes a line for each item without what its format needs, and the item is skipped; None: the first stops.

    Raises:
        UserError: nothing of that name, a malformed file, an item without what its format needs, formats that differ.
    """
    items, kinds = [], set()
    for source in [data] if isinstance(data, str) else data:
        part, kind = _load_one(source, mirror, data_format, unusable)
        items += part
        kinds.add(kind)
    if len(kinds) > 1:
        raise UserError(f"data mixes {' and '.join(sorted(kinds))} items; convert them to one format")
    if not items:
        raise UserError(f"{data} holds no item that can be used; the first: {unusable[0]}")
    return items, FORMATS[kinds.pop()]


def _load_one(source: str, mirror: str | None, data_format: str, unusable: list[str] | None) -> tuple[list[Item], str]:
    name, first = (m[1], int(m[2])) if (m := re.fullmatch(r"(.+)\[:(\d+)\]", source)) else (source, None)
    path = Path(name)
    if name == DEMO:
        items = facts.items("train")
    elif name in published.HUB_PARTS:
        items = published.hub_part(name)
    elif name in published.ALL:
        path = published.fetch(name, **({"base_url": mirror} if mirror else {}))
        items = read_examples(path, unusable)
    elif path.suffix in (".json", ".jsonl") or path.exists():
        items = read_examples(path, unusable)
    elif name.count("/") == 1:
        items = published.from_hub(name).to_list()
    else:
        known = listed([DEMO, *published.ALL, *published.HUB_PARTS], 20)
        raise UserError(f"data is {name!r}: no such file or known set; give a .json or .jsonl file, a hub id, or {known}")
    items = items[:first]
    if not items:
        raise UserError(f"{source} selects no item")
    check_choice("data_format", data_format, ("auto", *FORMATS))
    kind = _format_of(items[0]) if data_format == "auto" else data_format
    usable = []
    for number, item in enumerate(items, 1):
        whole = item if isinstance(item, Item) else Item(item, f"{path}: item {number}")
        try:
            FORMATS[kind].check(whole, whole.where)
            usable.append(whole)
        except UserError as error:
            if unusable is None:
                raise
            unusable.append(str(error))
    return usable, kind


def _format_of(item: dict) -> str:
    """The format that an item's keys name."""
    if "messages" in item:
        return "chat"
    return "questions" if "question" in item and "instruction" not in item else "instruction"
