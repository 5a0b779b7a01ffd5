"""One evaluation: model (and adapter) × tasks × protocols → item files, figures, table.

OUTPUT/results.json                    the figures           OUTPUT/TASK.PROTOCOL.jsonl   every item with its verdict
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..checkpoint.values import finite
from ..data.instruction import prompt_of
from ..data.limits import check_tokens
from ..errors import UserError, listed, near_misses
from ..support.environment import peak_bytes
from ..support.files import write_json
from ..support.folders import whole_folder
from ..support.models import contiguous_head
from ..training.recipe import TrainRecipe
from .generate import generate
from .likelihood import continuation_tokens, likelihood
from .paper import check_fixed, paper
from .protocols import BOTH, PROTOCOLS, protocols_of
from .summary import add_published, overall, summarize, table
from .tasks import load_task


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
    progress: Callable[[str, int], tuple[Callable[[float], None], Callable[[], None]]] | None = None,
) -> dict:
    """Score a model that is loaded already.

    Args:
        tasks: (name, items) pairs, see `tasks.load_task`.
        beams, max_new_tokens: of protocol `generate`, 1 and 32 by default; `paper` has its own.
        output: folder for the item files and results.json, whole or as it was; None writes nothing.
        facts: (base model, method, rank), to find the published figure.
        progress: (label, number of items) → (advance, close).

    Returns:
        {"results": […], "averages": […], "peak_bytes": …}

    Raises:
        UserError: an unknown protocol, or a model whose weights or scores are NaN or infinite.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise UserError(f"protocol is {protocol!r}; expected {' or '.join(PROTOCOLS)}{near_misses(protocol, PROTOCOLS)}")
    if "paper" in protocols:
        check_fixed(beams=beams, max_new_tokens=max_new_tokens)
    refuse_spoiled(model)
    prompts = (tokenizer(prompt_of(item))["input_ids"] for _, items in tasks for item in items)
    answers = continuation_tokens(tokenizer) if tuple(protocols) == ("likelihood",) else max_new_tokens or 32
    check_tokens(model, tokenizer, prompts, answers, "leave out items of more than {} tokens, or lower max_new_tokens")
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
            advance, close = progress(f"{name} {protocol}", len(items)) if progress else (lambda n: None, lambda: None)
            started = time.perf_counter()
            with contiguous_head(model):
                if protocol == "generate":
                    records = generate(model, tokenizer, items, batch_size, beams or 1, max_new_tokens or 32, advance)
                elif protocol == "paper":
                    records = paper(model, tokenizer, items, batch_size, advance)
                else:
                    records = likelihood(model, tokenizer, items, batch_size, advance)
            close()
            result = summarize(name, items, records, protocol, time.perf_counter() - started)
            results.append(add_published(result, *facts))
            if output is not None:
                _write_items(output / f"{name}.{protocol}.jsonl", records)
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


def show(summary: dict) -> str:
    return table(summary["results"] + summary["averages"], summary["peak_bytes"])


def load_tasks(names: Sequence[str], mirror: str | None = None, limit: int | None = None) -> list[tuple[str, list[dict]]]:
    """`tasks.load_task` for each name; two tasks of one name are an error."""
    tasks = [load_task(name, mirror, limit) for name in names]
    seen: set[str] = set()
    for name, _ in tasks:
        if name in seen:
            raise UserError(f"two tasks are called {name!r}; rename one of the files")
        seen.add(name)
    return tasks


def after_training(recipe: TrainRecipe, say, progress):
    """What scores the model that a training run ends with, on the recipe's tasks into OUTPUT/scores/after; None without tasks.

    The tasks are read now: a file that is not there is found before the training, not after it.
    """
    if not recipe.tasks:
        return None
    tasks = load_tasks(recipe.tasks, recipe.mirror, recipe.tasks_limit)

    def score(model, tokenizer) -> None:
        summary = evaluate(
            model,
            tokenizer,
            tasks,
            protocols_of(recipe.tasks_protocol),
            batch_size=recipe.tasks_batch_size,
            output=Path(recipe.output) / "scores" / "after",
            facts=(recipe.model, recipe.method, recipe.rank),
            progress=progress,
        )
        say(show(summary))

    return score


def _write_items(path: Path, records: Sequence[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
