"""`doratune analyze RUN …`: ΔM and ΔD of §3.2, spectra of the updates, gradients of §4.2, as numbers and figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..support.values import number
from .arguments import parse
from .inputs import refuse_missing
from .output import keep_freed_memory, print_json, say, say_next

EXAMPLE = "doratune analyze runs/dora runs/lora --modules q_proj v_proj"


@dataclass(kw_only=True)
class AnalyzeSettings:
    """How far magnitude (ΔM) and direction (ΔD) of each weight moved from the base model (section 3.2), for one or several runs.

    Args:
        model: base model: hub id, local folder, or smollm2-135m-instruct; default: the one that the first adapter records
        runs: folders of doratune train, adapter folders, or folders of ordinary models (full fine-tuning)
        modules: last names of the weights that count (the paper takes query and value); none: all
        magnitude_axis: of ordinary models: output (per row) or input (per column); adapters have their own
        spectrum: singular values of the updates: all, adapters (those of ordinary models take a dense SVD each), or none
        gradient_data: training data (.json, .jsonl, a published set, demo), for the share of the gradient that changes magnitudes
        gradient_items: the first so many items of it, in one batch
        dtype: dtype of the base model
        check_base: refuse a base whose row norms are not those of the base that an adapter was trained on
        format: of the figures: png or svg
        output: folder for points.json and the figures
        trust_remote_code: run the Python code that the model's folder or repository brings
        overwrite: replace an output folder that doratune wrote
    """

    model: str | None = None
    runs: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    magnitude_axis: Literal["output", "input"] = "output"
    spectrum: Literal["all", "adapters", "none"] = "all"
    gradient_data: str | None = None
    gradient_items: int = number(16, least=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    check_base: bool = True
    format: Literal["png", "svg"] = "png"
    output: str = "runs/analysis"
    trust_remote_code: bool = False
    overwrite: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(AnalyzeSettings, argv, "analyze", EXAMPLE, words="runs")
    keep_freed_memory()
    from pathlib import Path

    from ..analysis.gradients import batch_of
    from ..analysis.runs import last_result
    from ..analysis.summary import analyze
    from ..checkpoint.base_model import load_base
    from ..errors import UserError
    from ..support.folders import refuse_existing
    from ..support.models import load_tokenizer
    from ..support.outputs import refuse_inputs

    if not settings.runs:
        raise UserError("runs is not set; give doratune analyze RUN, or several")
    if twice := {name for name in settings.runs if settings.runs.count(name) > 1}:
        raise UserError(f"runs names {', '.join(sorted(twice))} twice; name each run once")
    refuse_missing({"gradient_data": settings.gradient_data}, {"runs": settings.runs})
    output = Path(settings.output)
    refuse_inputs(output, {"the model": settings.model, "the data": settings.gradient_data}, settings.runs)
    refuse_existing(output, settings.overwrite)
    name = settings.model or base_of(settings.runs)
    refuse_inputs(output, {"the model": name})
    trusted = {"trust_remote_code": settings.trust_remote_code}
    base = load_base(name, last_result(settings.runs), settings.dtype, **trusted)
    batch = None
    if settings.gradient_data is not None:
        batch = batch_of(settings.gradient_data, base, load_tokenizer(name, **trusted), settings.gradient_items)
    places = (output, settings.format, settings.overwrite)
    more = settings.spectrum, batch, settings.check_base
    result = analyze(base, settings.runs, tuple(settings.modules), settings.magnitude_axis, *places, *more)
    say(result.table())
    say(f"points and figures written to {output}")
    say_next(("report", *settings.runs, "--analysis", output, "--output", "report.html"))
    if as_json:
        print_json(result.to_dict() | {"output": settings.output})
    return 0


def base_of(runs: list[str]) -> str:
    """The base model that the first of the runs' adapters records.

    Raises:
        UserError: none of them does; what the first run lacks.
    """
    from pathlib import Path

    from ..analysis.runs import checkpoints
    from ..checkpoint.adapter import base_model_of
    from ..errors import UserError

    problems = []
    for run in runs:
        try:
            return base_model_of(checkpoints(Path(run))[-1][1])
        except UserError as error:
            problems.append(error)
    raise problems[0]
