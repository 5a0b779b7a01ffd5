"""The examples of a run: read, split, tokenized, and counted where they were cut or could not be used."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..data import encoder, load_items, recognition
from ..data.encode import DataReport, encode_all
from ..data.formats import DataFormat
from ..errors import UserError
from .recipe import TrainRecipe


def datasets(
    recipe: TrainRecipe, tokenizer, say: Callable[[str], None], counts: dict[str, dict[str, int]] | None = None
) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows), tokenized; what the length limit did, and what was skipped, is said.

    Args:
        counts: takes the numbers of examples, cut, too long and unusable, of both.

    Raises:
        UserError: data that cannot be read, or an item that cannot be used, unless `bad_items` is skip.
    """
    unusable: list[str] | None = [] if recipe.bad_items == "skip" else None
    reading = {"mirror": recipe.mirror, "settings": recipe.reading()}
    items, kind = load_items(recipe.data, unusable=unusable, weights=recipe.data_weights, seed=recipe.seed, **reading)
    say(recognition(kind, recipe.data_format))
    if recipe.limit is not None or recipe.eval_size:
        random.Random(recipe.seed).shuffle(items)
    eval_items, eval_kind = [], kind
    eval_unusable: list[str] | None = None if unusable is None else []
    if recipe.eval_data:
        eval_items, eval_kind = load_items(recipe.eval_data, unusable=eval_unusable, **reading)
    elif recipe.eval_size:
        if recipe.eval_size >= len(items):
            raise UserError(f"eval_size is {recipe.eval_size}, but {recipe.data} holds {len(items)} examples; make it smaller")
        eval_items, items = items[: recipe.eval_size], items[recipe.eval_size :]
    items = items[: recipe.limit]

    def tokens(items: list, kind: DataFormat, unusable: list[str] | None) -> tuple[list[dict], DataReport]:
        limits = recipe.max_length, recipe.too_long, recipe.train_on_prompt, unusable
        return encode_all(items, encoder(kind, recipe.reading()), tokenizer, *limits)

    rows, report = tokens(items, kind, unusable)
    say(f"training data: {recipe.data}: {report} (max_length {recipe.max_length})")
    eval_rows, eval_report = tokens(eval_items, eval_kind, eval_unusable) if eval_items else ([], DataReport())
    if eval_report.cut or eval_report.skipped or eval_report.unusable:
        say(f"evaluation data: {recipe.eval_data or recipe.data}: {eval_report}")
    if counts is not None:
        counts |= {"training": report.counts(), "evaluation": eval_report.counts()}
    return rows, eval_rows
