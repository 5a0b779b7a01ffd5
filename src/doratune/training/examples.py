"""The examples of a run: read, split, tokenized, and counted where they were cut or could not be used."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from ..data import encoder, load_items, recognition
from ..data.encode import AnswerCollator, DataReport, encode_all
from ..data.formats import DataFormat
from ..data.image_batches import ImageTextCollator
from ..data.image_reader import ImageReader
from ..data.packing import PackingCollator, examples_of
from ..errors import UserError
from .recipe import TrainRecipe
from .streaming import StreamedRows


class RunExamples(NamedTuple):
    """Rows to train and to evaluate on, tokenized, and the format of the training items."""

    rows: list[dict] | StreamedRows
    eval_rows: list[dict]
    kind: DataFormat


def datasets(recipe: TrainRecipe, tokenizer, say: Callable[[str], None]) -> tuple[list[dict] | StreamedRows, list[dict]]:
    """(training rows, evaluation rows) of a recipe; see `read_examples`."""
    return read_examples(recipe, tokenizer, say)[:2]


def read_examples(
    recipe: TrainRecipe, tokenizer, say: Callable[[str], None], counts: dict[str, dict[str, int]] | None = None
) -> RunExamples:
    """The examples of a recipe; what the length limit did, and what was skipped, is said.

    Args:
        counts: takes the numbers of examples, cut, too long and unusable, of both.

    Raises:
        UserError: data that cannot be read, or an item that cannot be used, unless `bad_items` is skip.
    """
    skip = recipe.bad_items == "skip"
    eval_items, eval_unusable = [], [] if skip else None
    if recipe.streaming:
        rows = StreamedRows(recipe, tokenizer)
        kind = eval_kind = rows.kind
        report = rows.report
        say(recognition(rows.kind, recipe.data_format))
        say(f"training data: {recipe.data}: read while it is trained on (max_length {recipe.max_length})")
    else:
        unusable: list[str] | None = [] if skip else None
        items, kind = load_items(
            recipe.data, recipe.mirror, unusable=unusable, settings=recipe.reading(), weights=recipe.data_weights, seed=recipe.seed
        )
        say(recognition(kind, recipe.data_format))
        if odd := [f"{item.where} {note}" for item in items for note in kind.odd(item, recipe.reading())]:
            say(f"warning: {len(odd)} items are odd; the first: {odd[0]}; doratune data shows all")
        items, eval_items, eval_kind = *_split(items, recipe), kind
    if recipe.eval_data:
        eval_items, eval_kind = load_items(recipe.eval_data, recipe.mirror, unusable=eval_unusable, settings=recipe.reading())
    if not recipe.streaming:
        rows, report = _tokens(items, kind, recipe, tokenizer, unusable)
        say(f"training data: {recipe.data}: {report} (max_length {recipe.max_length})")
    eval_rows, eval_report = _tokens(eval_items, eval_kind, recipe, tokenizer, eval_unusable) if eval_items else ([], DataReport())
    if eval_report.cut or eval_report.skipped or eval_report.unusable:
        say(f"evaluation data: {recipe.eval_data or recipe.data}: {eval_report}")
    if counts is not None:
        counts |= {"training": report.counts(), "evaluation": eval_report.counts()}
    return RunExamples(rows, eval_rows, kind)


def _split(items: list, recipe: TrainRecipe) -> tuple[list, list]:
    """(training items, those split off for evaluation)."""
    if recipe.limit is not None or recipe.eval_size:
        random.Random(recipe.seed).shuffle(items)
    if recipe.eval_size >= len(items):
        raise UserError(f"eval_size is {recipe.eval_size}, but {recipe.data} holds {len(items)} examples; make it smaller")
    return items[recipe.eval_size :][: recipe.limit], items[: recipe.eval_size]


def _tokens(
    items: list, kind: DataFormat, recipe: TrainRecipe, tokenizer, unusable: list[str] | None
) -> tuple[list[dict], DataReport]:
    limits = recipe.max_length, recipe.too_long, recipe.train_on_prompt, unusable
    return encode_all(items, encoder(kind, recipe.reading()), tokenizer, *limits)


def collator(recipe: TrainRecipe, tokenizer, model) -> AnswerCollator | PackingCollator | ImageTextCollator:
    """What makes batches of rows.

    Raises:
        UserError: packing, for a model of images and text.
    """
    if not isinstance(tokenizer, ImageReader):
        return (PackingCollator if recipe.packing else AnswerCollator)(tokenizer.pad_token_id, model)
    if recipe.packing:
        raise UserError("packing: rows of several examples are not for models of images and text; set packing: false")
    return ImageTextCollator(tokenizer, model)


def first_rows(rows: list[dict] | StreamedRows) -> list[dict]:
    """The rows that are there before the run."""
    return rows.first if isinstance(rows, StreamedRows) else rows


def count_of(rows: list[dict] | StreamedRows) -> int:
    """How many examples there are, packed or not; of those that are streamed, how many were read."""
    if isinstance(rows, StreamedRows):
        return rows.report.examples
    return examples_of(rows) if isinstance(rows, list) else len(rows)


def streamed_counts(rows: list[dict] | StreamedRows) -> dict[str, dict[str, int]]:
    """{"training": what was read, cut, too long and unusable} of rows that are streamed; nothing of others."""
    return {"training": rows.report.counts()} if isinstance(rows, StreamedRows) else {}
