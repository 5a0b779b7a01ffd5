"""Tasks of EleutherAI's lm-eval by name, `lm_eval:hellaswag`: its prompts, its metrics, over a model that is loaded here.

The package comes with the extra `harness`. Its tasks fetch their data from the hub, or as a task file of your own says.
Cost: the harness's own, one request after the other in batches.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError, listed, near_misses
from ..support.environment import peak_bytes
from ..support.files import write_json
from ..support.folders import whole_folder
from ..support.packages import install_line
from ..support.tables import aligned

PREFIX = "lm_eval:"
SCORES = ("exact_match", "acc", "acc_norm")
"""Metrics of the harness that are shares of right answers; the first that a task has counts as its accuracy."""


def harness_tasks(names: Sequence[str]) -> list[str]:
    """The harness's names of these tasks; [] where none is one of its.

    Raises:
        UserError: some are and some are not, or lm-eval is not installed.
    """
    own = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    if not own:
        return []
    if len(own) < len(names):
        other = next(name for name in names if not name.startswith(PREFIX))
        raise UserError(f"task mixes {PREFIX}{own[0]} and {other}; score lm-eval's tasks by a command of their own")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"task {PREFIX}{own[0]} needs lm-eval; run: {install_line('lm_eval')}")
    return own


def manager_of(tasks: Sequence[str], folder: str | None):
    """lm-eval's list of tasks, with those of a folder of task files.

    Raises:
        UserError: no such folder, or a task that it does not know.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"lm_eval_path is {folder!r}, which is no folder; give one with task files of lm-eval")
    manager = TaskManager(include_path=folder)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(f"lm-eval has no task {name!r}{near_misses(name, manager.all_tasks)}")
    return manager


def evaluate_harness(
    model, tokenizer, tasks: Sequence[str], manager, *, batch_size: int = 8, limit: int | None = None, output: Path | None = None
) -> dict:
    """Score a loaded model; what `evaluate` returns, and the harness's own figures under `lm_eval`.

    Raises:
        UserError: a task's data cannot be had, or the harness fails on it.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        figures = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False)
    except Exception as error:  # the harness, `datasets` and the hub have types of their own
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise UserError(f"lm-eval: {listed(tasks, 3)}: {type(error).__name__}: {reason[:300]}") from error
    counts = figures.get("n-samples", {})
    results = [_result(name, values, counts.get(name, {}).get("effective", 0)) for name, values in figures["results"].items()]
    summary = {"results": [r for r in results if "accuracy" in r], "averages": [], "peak_bytes": peak_bytes(), "lm_eval": results}
    if output is not None:
        with whole_folder(output, key="results.json") as folder:
            write_json(folder / "results.json", summary)
    return summary


def _result(name: str, values: Mapping, count: int) -> dict:
    """The harness's figures of one task, by metric."""
    numbers = {key.partition(",")[0]: value for key, value in values.items() if isinstance(value, int | float)}
    metrics = {}
    for metric in (key for key in numbers if not key.endswith("_stderr")):
        error = numbers.get(f"{metric}_stderr", math.nan)
        metrics[metric] = {"mean": numbers[metric], "standard_error": error if math.isfinite(error) else None}
    result = {"task": name, "protocol": "lm_eval", "total": count, "metrics": metrics}
    score = next((metric for metric in SCORES if metric in metrics), None)
    if score is None or not count:
        return result
    accuracy = metrics[score]["mean"]
    return result | {"accuracy": accuracy, "right": round(accuracy * count), "standard_error": metrics[score]["standard_error"]}


def show_harness(summary: Mapping) -> str:
    """A line a task and metric."""
    rows = []
    for result in summary["lm_eval"]:
        for metric, figure in result["metrics"].items():
            error = "" if figure["standard_error"] is None else f"± {figure['standard_error']:.4f}"
            rows.append([result["task"], metric, f"{figure['mean']:.4f}", error, str(result["total"])])
    return "\n".join(aligned(["task of lm-eval", "metric", "value", "error", "items"], rows))
