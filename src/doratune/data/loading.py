"""Items of one or several sources, renamed, recognized and checked; every problem with the item's place and line.

The format is that of the first item that any format recognizes, or the one that the settings name; items of another format are an
error each. Cost: one pass over the items.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ..errors import UserError, listed, near_misses
from .conversation import tools_of
from .files import Item, placed
from .formats import DataFormat, first_format, format_named, format_of, nearest, suggestion, unknown_item
from .settings import DataSettings
from .sources import each_item

_LOOKED_AT = 100
"""Items among which the format is looked for."""


def load_items(
    data: str | list[str],
    mirror: str | None = None,
    data_format: str = "auto",
    unusable: list[str] | None = None,
    settings: DataSettings | None = None,
    weights: Sequence[float] = (),
    seed: int = 0,
) -> tuple[list[Item], DataFormat]:
    """(items, format) of one or several sources, in order; every item checked.

    A source is a file, a folder, a published name, `demo` (the demonstration's training half) or a hub id (`sources.py`);
    `source[:N]` takes its first N items.

    Args:
        data_format: as `DataSettings` has it, which counts where both are there.
        unusable: takes a line for each item without what its format needs, and the item is skipped; None: the first stops.
        weights: how often each source's items are seen, 1 where none is said: 2 is twice, 0.5 a half of them, drawn with the seed.

    Raises:
        UserError: nothing of that name, a malformed file, an item without what its format needs, formats that differ.
    """
    settings = settings or DataSettings(data_format=data_format)
    sources = [data] if isinstance(data, str) else data
    check_weights(weights, sources)
    items, kinds = [], {}
    for source, weight in zip(sources, weights or [1] * len(sources)):
        part, kind = _load_one(source, mirror, settings, unusable)
        items += weighted(part, weight, seed)
        kinds[kind.name] = kind
    if len(kinds) > 1:
        raise UserError(f"data mixes {' and '.join(sorted(kinds))} items; convert them to one format")
    if not items:
        raise UserError(f"{listed(sources)} holds no item that can be used; the first: {unusable[0]}")
    return items, kinds.popitem()[1]


def check_weights(weights: Sequence[float], sources: Sequence[str]) -> None:
    """Raise for weights that are not one number above 0 for each source."""
    if weights and len(weights) != len(sources):
        raise UserError(f"data_weights are {len(weights)}, the sources of data {len(sources)}; give one for each")


def weighted(items: list, weight: float, seed: int) -> list:
    """The items `weight` times: whole rounds in order, and a part of one drawn with the seed."""
    whole, part = int(weight), round((weight - int(weight)) * len(items))
    return items * whole + ([items[i] for i in sorted(random.Random(seed).sample(range(len(items)), part))] if part else [])


def _load_one(source: str, mirror: str | None, settings: DataSettings, unusable: list[str] | None) -> tuple[list[Item], DataFormat]:
    before = len(unusable or ())
    items = [renamed(item, settings.columns) for item in each_item(source, mirror, unusable)]
    if not items:
        if len(unusable or ()) > before:
            raise UserError(f"{source} holds no item that can be used; the first: {unusable[before]}")
        raise UserError(f"{source} selects no item" if source.endswith("]") else f"{source} holds no examples")
    kind = recognized(items, settings)
    return list(checked(items, kind, settings, unusable)), kind


def recognized(items: Sequence[Item], settings: DataSettings) -> DataFormat:
    """The format of these items.

    Raises:
        UserError: the first is of no format that is known; `columns` names a field that the format has not.
    """
    if settings.data_format != "auto":
        kind = format_named(settings.data_format)
    else:
        kind = first_format(items[:_LOOKED_AT])
        if kind is None and (suggestion(items[0]) is not None or (kind := nearest(items[0])) is None):
            raise UserError(placed(unknown_item(items[0], items[0].where), items[0]))
    for name in settings.columns:
        if name not in kind.fields():
            raise UserError(
                f"columns names {name!r}; {kind.name} data has {', '.join(kind.fields())}{near_misses(name, kind.fields())}"
            )
    return kind


def recognition(kind: DataFormat, data_format: str) -> str:
    """One line about the format of a data set, and what overrules it."""
    return f"data_format: {kind.name} ({kind.shown})" + (", by its keys; --data_format overrules" if data_format == "auto" else "")


def checked(items: Iterable[Item], kind: DataFormat, settings: DataSettings, unusable: list[str] | None) -> Iterator[Item]:
    """The items that have what the format needs.

    Raises:
        UserError: one has not, and `unusable` takes no line of it.
    """
    for item in items:
        try:
            kind.check(item, item.where, settings)
        except UserError as error:
            problem = placed(_explained(error, item, kind), item)
            if unusable is None:
                raise UserError(problem) from None
            unusable.append(problem)
            continue
        yield item


def _explained(error: UserError, item: Item, kind: DataFormat) -> str:
    """What a format says of an item, with what the item is instead."""
    if kind.recognizes(item):
        return str(error)
    other = format_of(item)
    if other is not None and other is not kind:
        return f"{error}; this item is {other.name} data ({other.shown}): convert all items to one format"
    keys = ", ".join(map(repr, itertools.islice(item, 8))) or "none"
    return f"{error}; its keys are {keys}"


def renamed(item: Item, columns: Mapping[str, str]) -> Item:
    """The item under the format's own names of fields, in itself and in the messages of its lists."""
    if not columns:
        return item
    ours = {theirs: name for name, theirs in columns.items()}

    def rename(value):
        if isinstance(value, Mapping):
            kept = {k: v for k, v in value.items() if k in ours or k not in columns}
            return {ours.get(k, k): v for k, v in kept.items()}
        return value

    values = rename(item)
    lists = {k: [rename(m) for m in v] for k, v in values.items() if isinstance(v, list)}
    return item.renamed(values | lists)


def encoder(kind: DataFormat | str, settings: DataSettings | str = "plain") -> Callable:
    """How items of a format become tokens: a function of an item and a tokenizer.

    Args:
        settings: all of them, or the prompt alone.

    Raises:
        UserError: the published prompt for items that are no instructions; preference pairs, which no answer is learned from.
    """
    kind = format_named(kind) if isinstance(kind, str) else kind
    settings = DataSettings(prompt=settings) if isinstance(settings, str) else settings
    if settings.prompt == "published" and kind.name != "instruction":
        raise UserError(f"prompt is published, which is for instruction data, not for {kind.name} data; drop it")
    if not kind.learns:
        raise UserError(
            f"the items are {kind.name} pairs ({kind.shown}), which doratune train does not learn from; docs/data.md shows the way "
            "into TRL's DPOTrainer"
        )

    def encode(item, tokenizer):
        return kind.encode(item, tokenizer, settings)

    return encode


def preference_pairs(
    data: str | list[str], mirror: str | None = None, unusable: list[str] | None = None, settings: DataSettings | None = None
) -> list[dict]:
    """Preference pairs as TRL's DPOTrainer takes them: {prompt, chosen, rejected}, each a list of messages, and tools if any.

    Raises:
        UserError: see `load_items`; items that are no pairs.
    """
    settings = settings or DataSettings()
    items, kind = load_items(data, mirror, unusable=unusable, settings=settings)
    if kind.name != "preference":
        sources = listed([data] if isinstance(data, str) else data)
        raise UserError(f"{sources} holds {kind.name} data ({kind.shown}); preference pairs have chosen and rejected")
    rows = []
    for item in items:
        prompt, chosen, rejected = kind.pair(item, item.where, settings)
        tools = tools_of(item.get("tools"), item.where)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected} | ({"tools": tools} if tools else {}))
    return rows
