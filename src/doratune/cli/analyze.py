"""`doratune analyze RUN …`: ΔM and ΔD of §3.2, as points, correlation and figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .arguments import parse
from .output import keep_freed_memory, print_json, say

EXAMPLE = "doratune analyze runs/dora runs/lora --modules q_proj v_proj"


@dataclass(kw_only=True)
class AnalyzeSettings:
    """How far magnitude (ΔM) and direction (ΔD) of each weight moved from the base model (section 3.2), for one or several runs.

    Args:
        model: base model: hub id, local folder, or smollm2-135m-instruct; default: the one that the first adapter records
        runs: folders of doratune train, adapter folders, or folders of ordinary models (full fine-tuning)
        modules: last names of the weights that count (the paper takes query and value); none: all
        magnitude_axis: of ordinary models: output (per row) or input (per column); adapters have their own
        dtype: dtype of the base model
        format: of the figures: png or svg
        output: folder for points.json and the figures
        overwrite: replace an output folder that exists
    """

    model: str | None = None
    runs: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    magnitude_axis: Literal["output", "input"] = "output"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    format: Literal["png", "svg"] = "png"
    output: str = "runs/analysis"
    overwrite: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(AnalyzeSettings, argv, "analyze", EXAMPLE, words="runs")
    keep_freed_memory()
    from pathlib import Path

    from ..analysis.points import checkpoints
    from ..analysis.report import analyze
    from ..checkpoint.adapter import base_model_of
    from ..errors import UserError
    from ..models import load_model

    if not settings.runs:
        raise UserError("runs is not set; give doratune analyze RUN, or several")
    if twice := {name for name in settings.runs if settings.runs.count(name) > 1}:
        raise UserError(f"runs names {', '.join(sorted(twice))} twice; name each run once")
    folders = {run: checkpoints(Path(run)) for run in settings.runs}
    name = settings.model or base_model_of(folders[settings.runs[0]][-1][1])
    base = load_model(name, settings.dtype)
    output = Path(settings.output)
    result = analyze(
        base, settings.runs, tuple(settings.modules), settings.magnitude_axis, output, settings.format, settings.overwrite
    )
    say(result.table())
    say(f"points and figures written to {output}")
    if as_json:
        print_json(result.to_dict() | {"output": settings.output})
    return 0
