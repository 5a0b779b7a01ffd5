"""Examples of a run that are read while it trains, for data that does not fit in memory: one pass over the sources an epoch.

The sources take turns at random, by their weights; examples leave a buffer of BUFFER in random order, all from seed and epoch, so
that a resumed run sees what it would have seen. Packed rows are made of one buffer each. The first items are looked at before the
run, as all are elsewhere; a later one that cannot be used stops the run, or is counted. Cost: the buffer, and reading and
tokenizing again in each epoch.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from torch.utils.data import IterableDataset

from ..data import encoder
from ..data.encode import DataReport, encode_each
from ..data.formats import DataFormat
from ..data.loading import check_weights, checked, recognized, renamed
from ..data.packing import pack
from ..data.sources import each_item
from ..errors import UserError
from ..support.processes import refuse_several
from .recipe import TrainRecipe

BUFFER = 1000
"""Examples in memory."""
LOOKED_AT = 100
"""Items that are read, checked and tokenized before the run."""


class StreamedRows(IterableDataset):
    """{input_ids, labels, length} of each example, read when it is needed.

    Attributes:
        kind: the items' format. first: rows of the first items. report: what was read until now. packing: give packed rows.
    """

    def __init__(self, recipe: TrainRecipe, tokenizer):
        _check(recipe)
        self.recipe, self.tokenizer, self.epoch, self.packing = recipe, tokenizer, 0, False
        self.sources = [recipe.data] if isinstance(recipe.data, str) else list(recipe.data)
        check_weights(recipe.data_weights, self.sources)
        self.unusable: list[str] | None = [] if recipe.bad_items == "skip" else None
        self.kind = self._format()
        self.encode = encoder(self.kind, recipe.reading())
        self.report = DataReport()
        self.first = [row for _, row in zip(range(LOOKED_AT), self._encoded(self._first_items()))]
        if not self.first:
            raise UserError(f"{recipe.data}: none of the first items can be used; the first: {(self.unusable or ['too long'])[0]}")
        self.report = DataReport()

    def _format(self) -> DataFormat:
        kinds = {}
        for source in self.sources:
            items = list(itertools.islice(self._items(source), LOOKED_AT))
            if not items:
                raise UserError(f"{source} holds no examples")
            kind = recognized(items, self.recipe.reading())
            kinds[kind.name] = kind
        if len(kinds) > 1:
            raise UserError(f"data mixes {' and '.join(sorted(kinds))} items; convert them to one format")
        return kinds.popitem()[1]

    def _items(self, source: str) -> Iterator:
        for item in each_item(source, self.recipe.mirror, self.unusable, streaming=True):
            yield renamed(item, self.recipe.columns)

    def _first_items(self) -> Iterator:
        """The first items of all sources."""
        return itertools.chain.from_iterable(
            itertools.islice(self._items(s), LOOKED_AT // len(self.sources) or 1) for s in self.sources
        )

    def _encoded(self, items: Iterator) -> Iterator[dict]:
        recipe = self.recipe
        usable = checked(items, self.kind, recipe.reading(), self.unusable)
        limits = recipe.max_length, recipe.too_long, recipe.train_on_prompt, self.unusable
        return encode_each(usable, self.encode, self.tokenizer, *limits, self.report)

    def _drawn(self, generator: random.Random) -> Iterator:
        """The items of all sources in turns, each source as often as its weight says."""
        weights = self.recipe.data_weights or [1.0] * len(self.sources)
        streams = [(self._weighted(source, weight, generator), weight) for source, weight in zip(self.sources, weights)]
        while streams:
            place = generator.choices(range(len(streams)), [weight for _, weight in streams])[0]
            try:
                yield next(streams[place][0])
            except StopIteration:
                del streams[place]

    def _weighted(self, source: str, weight: float, generator: random.Random) -> Iterator:
        for _ in range(int(weight)):
            yield from self._items(source)
        if part := weight - int(weight):
            yield from (item for item in self._items(source) if generator.random() < part)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict]:
        generator = random.Random(self.recipe.seed * 1_000_003 + self.epoch)
        rows = self._encoded(self._drawn(generator))
        if self.packing:
            while buffer := list(itertools.islice(rows, BUFFER)):
                packs = pack(buffer, self.recipe.max_length, generator.randrange(1 << 30))
                generator.shuffle(packs)
                yield from packs
            return
        buffer: list[dict] = []
        for row in rows:
            if len(buffer) < BUFFER:
                buffer.append(row)
                continue
            place = generator.randrange(BUFFER)
            yield buffer[place]
            buffer[place] = row
        generator.shuffle(buffer)
        yield from buffer


def _check(recipe: TrainRecipe) -> None:
    """Raise for settings that need to know all of the data."""
    refuse_several("streaming")
    if recipe.max_steps < 1:
        raise UserError("streaming does not know how long an epoch is; set max_steps")
    for name, instead in (("eval_size", "give eval_data"), ("limit", "write data: SOURCE[:N]")):
        if getattr(recipe, name):
            raise UserError(f"{name} is {getattr(recipe, name)}, which needs all of the data; {instead}, or drop streaming")
