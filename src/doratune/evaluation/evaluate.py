"""One evaluation: model (and adapter) × tasks × protocols → item files, figures, table.

OUTPUT/results.json                    the figures           OUTPUT/TASK.PROTOCOL.jsonl   every item with its verdict
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.values import finite
from ..data.limits import check_tokens
from ..errors import UserError, listed, near_misses
from ..support.environment import peak_bytes
from ..support.files import write_json
from ..support.folders import whole_folder
from ..support.models import contiguous_head
from ..support.progress import Progress, silent
from ..training.recipe import TrainRecipe
from .generate import generate
from .kinds import kind_of
from .likelihood import continuation_tokens, likelihood
from .own_items import OwnTask
from .paper import check_fixed, paper
from .protocols import BOTH, PROTOCOLS, protocols_of
from .summary import add_published, overall, summarize, table
from .tasks import kinds_of, load_task, protocols_for


def evaluate(
    model,
    tokenizer,
    tasks: Sequence[tuple[str, list[dict]]],
    protocols: Sequence[str] = BOTH,
    *,
    batch_size: int = 16,
    beams: int | None = None,
    max_new_tokens: int | None = None,
    output: Path | None = None,
    facts: tuple[str, str | None, int | None] = ("", None, None),
    progress: Progress = silent,
) -> dict:
    """Score a model that is loaded already.

    Args:
        tasks: (name, items) pairs, see `tasks.load_task`.
        protocols: each task is scored by those of them that its kind of items has; one at least.
        beams, max_new_tokens: of protocol `generate`, 1 and what the items' kind needs by default; `paper` has its own.
        output: folder for the item files and results.json, whole or as it was; None writes nothing.
        facts: (base model, method, rank), to find the published figure.
        progress: as `support.progress`, of items.

    Returns:
        {"results": […], "averages": […], "peak_bytes": …}

    Raises:
        UserError: an unknown protocol, one that a task does not have, or a model whose weights or scores are NaN or infinite.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise UserError(f"protocol is {protocol!r}; expected {' or '.join(PROTOCOLS)}{near_misses(protocol, PROTOCOLS)}")
    check_protocols(tasks, protocols, beams=beams, max_new_tokens=max_new_tokens)
    refuse_spoiled(model)
    check_items(model, tokenizer, tasks, protocols, max_new_tokens)
    if output is not None:
        with whole_folder(output, key="results.json") as folder:
            summary = _score(model, tokenizer, tasks, protocols, (batch_size, beams, max_new_tokens), folder, facts, progress)
            write_json(folder / "results.json", summary)
        return summary
    return _score(model, tokenizer, tasks, protocols, (batch_size, beams, max_new_tokens), None, facts, progress)


def _score(model, tokenizer, tasks, protocols, sizes, output: Path | None, facts, progress) -> dict:
    """What `evaluate` returns; the item files go into `output`."""
    batch_size, beams, max_new_tokens = sizes
    was_training = model.training
    model.eval()
    results = []
    for protocol in protocols:
        for name, items in tasks:
            if not protocols_for(items, [protocol]):
                continue
            started = time.perf_counter()
            with progress(f"{name} {protocol}", len(items)) as advance, contiguous_head(model):
                if protocol == "generate":
                    longest = max_new_tokens or longest_output(items)
                    records = generate(model, tokenizer, items, batch_size, beams or 1, longest, advance)
                elif protocol == "paper":
                    records = paper(model, tokenizer, items, batch_size, advance)
                else:
                    records = likelihood(model, tokenizer, items, batch_size, advance)
            result = summarize(name, items, records, protocol, time.perf_counter() - started)
            results.append(add_published(result, *facts))
            if output is not None:
                write_items(output / f"{name}.{protocol}.jsonl", records)
    model.train(was_training)
    averages = [a for p in protocols if (a := overall([r for r in results if r["protocol"] == p]))]
    return {"results": results, "averages": averages, "peak_bytes": peak_bytes()}


def refuse_spoiled(model) -> None:
    """Raise where the model's numbers are none: it would answer everything alike, and be scored.

    Raises:
        UserError: parameters with NaN or infinite values, by name.
    """
    bad = [name for name, p in model.named_parameters() if not finite(p.detach())]
    if bad:
        raise UserError(f"{listed(bad, 3)}: NaN or infinite values; a model with them cannot be evaluated, copy or train it again")


def check_items(
    model, tokenizer, tasks: Sequence[tuple[str, list[dict]]], protocols: Sequence[str], max_new_tokens: int | None = None
) -> None:
    """Hold the items' tokens, and what is written behind them, against the model.

    Raises:
        UserError: a token that the model does not have, or an item longer than its positions.
    """
    for _, items in tasks:
        prompts = (kind_of(item).tokens(item, tokenizer) for item in items)
        written = max_new_tokens or longest_output(items)
        answers = continuation_tokens(items, tokenizer) if tuple(protocols) == ("likelihood",) else written
        check_tokens(model, tokenizer, prompts, answers, "leave out items of more than {} tokens, or lower max_new_tokens")


def longest_output(items: Sequence[dict]) -> int:
    """Tokens that an answer to these items may have."""
    return max(kind.max_new_tokens for kind in kinds_of(items))


def check_protocols(tasks: Sequence[tuple[str, list[dict]]], protocols: Sequence[str], **settings: int | None) -> None:
    """Hold the protocols, and the settings that `paper` fixes, against the tasks.

    Raises:
        UserError: a task that no protocol fits; a setting that differs from the published script's.
    """
    for name, items in tasks:
        if not protocols_for(items, protocols):
            have = " or ".join(protocols_for(items, PROTOCOLS))
            asked = " or ".join(protocols)
            raise UserError(f"{name} has no protocol {asked}: its answers are not chosen from a few; use {have}")
        if "paper" in protocols:
            for kind in (kind for kind in kinds_of(items) if "paper" in kind.protocols):
                check_fixed(kind.published.settings, **settings)


def show(summary: dict) -> str:
    return table(summary["results"] + summary["averages"], summary["peak_bytes"])


def load_tasks(
    names: Sequence[str], mirror: str | None = None, limit: int | None = None, own: OwnTask | None = None
) -> list[tuple[str, list[dict]]]:
    """`tasks.load_task` for each name; two tasks of one name are an error."""
    tasks = [load_task(name, mirror, limit, own) for name in names]
    seen: set[str] = set()
    for name, _ in tasks:
        if name in seen:
            raise UserError(f"two tasks are called {name!r}; rename one of the files")
        seen.add(name)
    return tasks


class AfterTraining:
    """Scores the model that a training run ends with, on the recipe's tasks, into OUTPUT/scores/after.

    The tasks are read at once, and `check` holds them against the model: what cannot be scored is found before the training.
    """

    def __init__(self, recipe: TrainRecipe, say, progress):
        self.recipe, self.say, self.progress = recipe, say, progress
        prompt = "template" if recipe.prompt == "template" else "plain"
        own = OwnTask(reading=dataclasses.replace(recipe.reading(), data_format="auto", columns={}), prompt=prompt)
        self.tasks = load_tasks(recipe.tasks, recipe.mirror, recipe.tasks_limit, own)
        self.protocols = protocols_of(recipe.tasks_protocol)

    def check(self, model, tokenizer) -> None:
        check_protocols(self.tasks, self.protocols)
        check_items(model, tokenizer, self.tasks, self.protocols)

    def __call__(self, model, tokenizer) -> None:
        recipe = self.recipe
        summary = evaluate(
            model,
            tokenizer,
            self.tasks,
            self.protocols,
            batch_size=recipe.tasks_batch_size,
            output=Path(recipe.output) / "scores" / "after",
            facts=(recipe.model, recipe.method, recipe.rank),
            progress=self.progress,
        )
        self.say(show(summary))


def after_training(recipe: TrainRecipe, say, progress: Progress = silent):
    """What scores a run's result, by its objective; None where the recipe names no tasks."""
    from .scorers import scorer_of  # which score by what is here

    if not recipe.tasks:
        return None
    scorer = scorer_of(recipe.objective)
    return AfterTraining(recipe, say, progress) if scorer is None else scorer.after_training(recipe, say, progress)


def write_items(path: Path, records: Sequence[dict]) -> None:
    """One record a line."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
