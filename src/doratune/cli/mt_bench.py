"""`doratune evaluate --task mt_bench`: answers, and their judgment by a model behind an address."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

from ..errors import UserError
from .output import print_json, progress, say

TASK = "mt_bench"
SETTINGS = ("judge", "judge_model", "against", "questions", "model_id")
"""Settings of `doratune evaluate` for this task alone."""


def asked_for(settings) -> bool:
    """Is MT-Bench the task?

    Raises:
        UserError: beside another task, or settings of it alone without it.
    """
    names = [settings.task] if isinstance(settings.task, str) else settings.task
    if TASK in names and len(names) > 1:
        raise UserError(f"task is {', '.join(names)}; {TASK} is evaluated by itself, since its output is answers and judgments")
    if TASK not in names:
        for name in SETTINGS:
            if getattr(settings, name) is not None:
                raise UserError(f"{name} is {getattr(settings, name)!r}, which is for --task {TASK}; drop it, or set the task")
    return TASK in names


def run(settings, as_json: bool) -> int:
    """Answer what is not answered, judge what is not judged."""
    from ..judging.answers import AnswerSettings, model_of
    from ..judging.client import JudgeSettings
    from ..judging.evaluation import BenchRun
    from ..judging.questions import load_bench
    from ..support.files import write_json
    from ..support.outputs import refuse_inputs, run_of

    _check(settings)
    output = Path(settings.output)
    inputs = {"the model": settings.model, "the adapter": settings.adapter, "the answers": settings.answers}
    inputs |= {"the questions": settings.questions, "the other run": settings.against}
    refuse_inputs(output, inputs, run_of(settings.adapter))
    bench = load_bench(settings.questions, settings.limit, **({"base_url": settings.mirror} if settings.mirror else {}))
    writing = AnswerSettings(settings.template, settings.max_new_tokens or 1024, settings.seed, settings.batch_size)
    if settings.answers:
        name, identity = model_of(Path(settings.answers)), {"answers": _digest(Path(settings.answers))}
    else:
        name, identity = _identity(settings, asdict(writing))
    bench_run = BenchRun(bench, output, name, identity, say)
    bench_run.begin(settings.overwrite)
    if settings.answers:
        bench_run.take(Path(settings.answers))
    elif missing := bench_run.missing():
        model, tokenizer = _load(settings)
        with progress(f"{name}: answers", len(bench.questions)) as advance:
            bench_run.answer(model, tokenizer, writing, advance)
        say(f"{len(missing)} questions answered, in {bench_run.answer_file}")
    results = {"model": name, "answers": str(bench_run.answer_file)}
    if settings.judge:
        options = {"parallel": settings.judge_parallel, "max_tokens": settings.judge_max_tokens}
        judge = JudgeSettings(settings.judge, settings.judge_model, settings.judge_retries, **options)
        if settings.against:
            results["pair"] = bench_run.judge_against(Path(settings.against), judge, progress)
        else:
            results["single"] = bench_run.judge(judge, progress)
        write_json(output / "results.json", results)
    else:
        say("no judge: give --judge URL --judge_model NAME with the same command to have the answers judged")
    if as_json:
        print_json(results | {"output": settings.output})
    return 0


def _check(settings) -> None:
    if settings.answers and (settings.model or settings.adapter):
        raise UserError("answers are there already; give one of --answers FILE and --model or --adapter")
    if not (settings.answers or settings.model or settings.adapter):
        raise UserError("neither model, adapter nor answers is set; give --model M, --adapter FOLDER, or --answers FILE")
    if bool(settings.judge) != bool(settings.judge_model):
        raise UserError("judge and judge_model belong together; give --judge URL --judge_model NAME")
    if settings.against and not settings.judge:
        raise UserError("against needs a judge; give --judge URL --judge_model NAME")
    if settings.protocol != "both" or settings.beams is not None:
        raise UserError(f"protocol and beams are not for {TASK}, whose answers are sampled as published; drop them")


def _identity(settings, writing: dict) -> tuple[str, dict]:
    """(name of the model in the files, what its answers depend on)."""
    from ..judging.evaluation import file_name

    base = settings.model or _base_model(settings.adapter)
    place = Path(settings.adapter or base)
    name = settings.model_id or (place.parent.name if place.name == "adapter" and place.parent.name else place.name)
    identity = {"model": base, "adapter": settings.adapter, "dtype": settings.dtype, "quantize": settings.quantize, **writing}
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    if settings.adapter:
        identity["weights"] = [_digest(path) for path in files]
    else:
        identity["weights"] = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return file_name(name), identity


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _base_model(adapter: str) -> str:
    from .. import baselines
    from ..checkpoint.adapter import base_model_of

    return (baselines.base_model_of if baselines.is_baseline(adapter) else base_model_of)(adapter)


def _load(settings):
    from .evaluate import load_both

    model, tokenizer, _ = load_both(settings, settings.model or _base_model(settings.adapter))
    return model, tokenizer
