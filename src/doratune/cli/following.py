"""What can be run on a finished run of training, by the files that it left: the last line of `doratune train` and `compare`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def after_run(run: Path, writes: bool) -> Iterator[tuple[str, ...]]:
    """What a finished run can be used for, by the files that it left; writes: is it of a language model?"""
    from ..support.pipelines import is_pipeline_adapter

    adapter, model = run / "adapter", run / "model"
    if is_pipeline_adapter(adapter):
        yield ("merge", "--adapter", str(adapter), "--output", f"{run}-merged")
        yield ("report", str(run))
        return
    result = ("--model", str(model)) if model.is_dir() else ("--adapter", str(adapter))
    whole = model.is_dir() or (adapter / "adapter_config.json").is_file()  # a baseline is scored, and nothing else
    if whole and writes and (Path(result[1]) / "tokenizer_config.json").is_file():
        yield ("chat", *result)
    yield ("evaluate", *result, "--task", "my_test.jsonl")
    if whole and not model.is_dir():
        yield ("merge", *result, "--output", f"{run}-merged")
    yield ("report", str(run))
