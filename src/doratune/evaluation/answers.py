"""The score of an answer file, without a model: each text is read as an output of protocol `generate` is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..support.environment import peak_bytes
from ..support.files import write_json
from ..support.folders import whole_folder
from .benchmarks import benchmark_of
from .evaluate import write_items
from .generate import read_output, record_of
from .kinds import kind_of
from .summary import summarize
from .tasks import load_task


def evaluate_answers(tasks: Sequence[str], answers: Path, output: Path, limit: int | None = None) -> dict:
    """The figures of one benchmark's answer file; what `evaluate` returns and writes.

    Raises:
        UserError: several tasks, one that is no benchmark, a limit, or an answer file of other questions.
    """
    place = benchmark_of(tasks[0]) if len(tasks) == 1 else None
    if place is None:
        raise UserError(f"answers are scored for one benchmark, such as --task vqav2:FOLDER; task is {', '.join(tasks)}")
    if limit is not None:
        raise UserError(f"limit is {limit}, but an answer file is scored whole; drop it")
    started = time.perf_counter()
    name, items = load_task(tasks[0])
    records = []
    for item, text in zip(items, place[0].answers(answers, items), strict=True):
        records.append(record_of(item, kind_of(item).prompt(item), text, *read_output(text, item)))
    result = summarize(name, items, records, "generate", time.perf_counter() - started)
    summary = {"results": [result | {"answers": str(answers)}], "averages": [], "peak_bytes": peak_bytes()}
    with whole_folder(output, key="results.json") as folder:
        write_items(folder / f"{name}.generate.jsonl", records)
        write_json(folder / "results.json", summary)
    return summary
