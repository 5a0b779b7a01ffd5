"""`doratune evaluate --model M [--adapter A] --task T`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..data.formats import names_of_formats
from ..evaluation.metrics import NAMES
from ..support.devices import Device
from ..support.values import choices, number
from .arguments import parse
from .inputs import refuse_missing
from .output import keep_freed_memory, print_json, progress, say, say_next

EXAMPLE = "doratune evaluate --model my-llama-7b --adapter runs/r8/adapter --task boolq --protocol paper"


@dataclass(kw_only=True)
class EvaluateSettings:
    """Score a model, or a model with an adapter.

    Args:
        model: hub id, local folder, or smollm2-135m-instruct; also a merged model; default: the adapter's base model
        adapter: adapter folder, ours or PEFT's, or a baseline's; none scores the model alone
        task: boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa (commonsense), AddSub,
            MultiArith, SingleEq, SVAMP, gsm8k (arithmetic), orca_math, mt_bench, NAME:FOLDER with the published files of vqav2,
            gqa, vizwiz, science_qa, textvqa, pope or mmbench, a .json file, or a list; of a classifier of images: labelled
            images, as a folder by class, a table of paths and labels, or an .npz file; of a VL-BART: NAME:FOLDER of vqa,
            gqa, nlvr, caption, tvqa, how2qa, tvc or yc2c (docs/vl_bart.md); a file may hold items of your
            own, in a format of training data, whose last answer is the right one;
            lm_eval:NAME is a task of lm-eval (pip install 'doratune[harness]')
        lm_eval_path: a folder with task files of lm-eval of your own
        metrics: of your own items: exact_match, f1, rouge_l, json, json_match, regex, function; the first decides what is right
        pattern: of the metric regex, for items without a pattern of their own
        function: of the metric function: FILE.py:NAME, called with (output, item), gives 0 to 1; the file's code is run
        data_format: of your own items; default by their keys
        images: of your own items: folder that images' names begin in; default: as the adapter was trained, else beside the file
        prompt: of your own items: plain, template (the tokenizer's), or auto: as the adapter was trained, else template if it can
        protocol: generate (the model writes), likelihood (the most probable answer), both, paper (the published evaluation), or all
        beams: of generate; default 1, greedy; paper has 4
        max_new_tokens: longest output of generate; default 32 (commonsense), 256 (arithmetic), 1024 (orca_math), as paper has
        batch_size: sequences at once; in float32 the score does not depend on it
        limit: only the first so many items of each task; of mt_bench, of each category
        dtype: dtype of the model
        device: cpu, cuda, mps or xpu; auto: the accelerator where there is one
        quantize: recorded (as the adapter was trained), none, nf4, fp4 or int8
        check_base: refuse a base whose row norms are not those of the base that the adapter was trained on
        output: folder for results.json and every item with its verdict
        mirror: base address of a mirror of the published data sets
        trust_remote_code: run the Python code that the model's folder or repository brings
        overwrite: replace an output folder that doratune wrote
        columns: your file's names of fields: of your own items those of their format ({prompt: query}), of a table of labelled
            images {image: NAME, label: NAME, split: NAME}, of one of masks {image: NAME, mask: NAME, split: NAME} (docs/vision.md)
        reduce_labels: of masks: is 0 of no class, and 1 the first; default as the model was trained
        bad_items: of images and video: stop at an item that cannot be used, or skip and count it
        image_tower: of VL-BART: the image model whose features it reads; default as it was trained
        features: of VL-BART: folder of the files of features, which are made where they are not there
        judge: of mt_bench: base address of an OpenAI-compatible server; its key is read from DORATUNE_JUDGE_KEY or OPENAI_API_KEY
        judge_model: of mt_bench: the judge's name there
        judge_retries: how often a call that failed is tried again
        judge_parallel: calls at a time
        judge_max_tokens: longest judgment
        against: of mt_bench: folder or answer file of another run, to judge both answers together, in both orders
        answers: of mt_bench or NAME:FOLDER: an answer file in the published layout, instead of a model
        questions: of mt_bench: folder with question.jsonl, judge_prompts.jsonl, reference_answer_gpt-4.jsonl; default the published
        model_id: of mt_bench: the model's name in the files; default the run's or the model's folder
        template: of mt_bench: chat (the tokenizer's), instruction (as instruction data is trained), auto (chat where there is one)
        seed: of mt_bench's sampled answers
    """

    model: str | None = None
    adapter: str | None = None
    task: str | list[str] = ""
    lm_eval_path: str | None = None
    metrics: list[str] = choices([], NAMES)
    pattern: str | None = None
    function: str | None = None
    data_format: str = choices("auto", ("auto", *names_of_formats()))
    images: str | None = None
    prompt: Literal["auto", "plain", "template"] = "auto"
    protocol: Literal["generate", "likelihood", "both", "paper", "all"] = "both"
    beams: int | None = number(None, least=1)
    max_new_tokens: int | None = number(None, least=1)
    batch_size: int = number(32, least=1)
    limit: int | None = number(None, least=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Device = "auto"
    quantize: Literal["recorded", "none", "nf4", "fp4", "int8"] = "recorded"
    check_base: bool = True
    output: str = "runs/evaluate"
    mirror: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    reduce_labels: bool | None = None
    bad_items: Literal["stop", "skip"] = "stop"
    image_tower: str | None = None
    features: str = "features"
    judge: str | None = None
    judge_model: str | None = None
    judge_retries: int = number(6, least=0)
    judge_parallel: int = number(4, least=1, most=64)
    judge_max_tokens: int = number(2048, least=1)
    against: str | None = None
    answers: str | None = None
    questions: str | None = None
    model_id: str | None = None
    template: Literal["auto", "chat", "instruction"] = "auto"
    seed: int = number(0, least=0)


def main(argv: list[str]) -> int:
    settings, as_json = parse(EvaluateSettings, argv, "evaluate", EXAMPLE)
    keep_freed_memory()
    from pathlib import Path

    from .. import baselines
    from ..checkpoint.adapter import base_model_of
    from ..errors import UserError
    from ..evaluation.harness import harness_tasks
    from ..evaluation.scorers import scorer_for
    from ..support.folders import refuse_existing
    from ..support.outputs import refuse_inputs, run_of
    from . import mt_bench

    if mt_bench.asked_for(settings):
        return mt_bench.run(settings, as_json)
    if settings.answers:
        return _score_answers(settings, as_json)
    if not settings.model and not settings.adapter:
        raise UserError("neither model nor adapter is set; give --model M, --adapter FOLDER, or both")
    if not settings.task:
        raise UserError("task is not set; give --task boolq, a list '[boolq, piqa]', or a .json file")
    names = [settings.task] if isinstance(settings.task, str) else settings.task
    refuse_missing({"task": names}, {"adapter": settings.adapter})
    refuse_existing(Path(settings.output), settings.overwrite)
    baseline = bool(settings.adapter) and baselines.is_baseline(settings.adapter)
    name = settings.model or (baselines.base_model_of if baseline else base_model_of)(settings.adapter)
    if harness := harness_tasks(names):
        return _score_harness(settings, name, harness, as_json)
    places = [task.partition(":")[2] or task for task in names]
    inputs = {"the model": name, "the adapter": settings.adapter, "a task": places}
    refuse_inputs(settings.output, inputs, run_of(settings.adapter))
    if (scorer := scorer_for(name, settings.adapter)) is not None:
        summary = scorer.evaluate(settings, name, say, progress)
        say(scorer.show(summary))
        _say_next(settings, name)
        if as_json:
            print_json(summary | {"output": settings.output})
        return 0
    return _score_text(settings, name, names, as_json)


def _say_next(settings: EvaluateSettings, name: str) -> None:
    """A scored adapter is merged or given to others, a model is trained. A baseline merges into nothing."""
    from .. import baselines

    if not settings.adapter:
        say_next(("init", "my.jsonl", "--model", name))
    elif not baselines.is_baseline(settings.adapter):
        folder = settings.adapter
        say_next(("merge", "--adapter", folder, "--output", "merged"), ("push", "--folder", folder, "--to", "OWNER/NAME"))


def _score_text(settings: EvaluateSettings, name: str, names: list[str], as_json: bool) -> int:
    """Tasks that are answered in text."""
    from pathlib import Path

    from ..errors import UserError
    from ..evaluation.evaluate import check_protocols, evaluate, load_tasks, show
    from ..evaluation.protocols import protocols_of

    protocols = protocols_of(settings.protocol)
    if settings.bad_items != "stop":
        raise UserError("bad_items is for labelled images, and this is no classifier of images; drop it")
    tasks = load_tasks(names, settings.mirror, settings.limit, _own_task(settings))
    check_protocols(tasks, protocols, beams=settings.beams, max_new_tokens=settings.max_new_tokens)
    if settings.dtype != "float32" and settings.batch_size > 1:
        say(f"note: in {settings.dtype} rounding makes single verdicts depend on the batch size; in float32 they do not")
    model, tokenizer, facts = load_both(settings, name)
    summary = evaluate(
        model,
        tokenizer,
        tasks,
        protocols,
        batch_size=settings.batch_size,
        beams=settings.beams,
        max_new_tokens=settings.max_new_tokens,
        output=Path(settings.output),
        facts=facts,
        progress=progress,
    )
    say(show(summary))
    _say_next(settings, name)
    if as_json:
        print_json(summary | {"output": settings.output})
    return 0


def _score_harness(settings: EvaluateSettings, name: str, tasks: list[str], as_json: bool) -> int:
    """Tasks of lm-eval."""
    from pathlib import Path

    from ..evaluation.harness import evaluate_harness, manager_of, show_harness
    from ..support.outputs import refuse_inputs, run_of

    refuse_inputs(settings.output, {"the model": name, "the adapter": settings.adapter}, run_of(settings.adapter))
    manager = manager_of(tasks, settings.lm_eval_path)
    model, tokenizer, _ = load_both(settings, name)
    sizes = {"batch_size": settings.batch_size, "limit": settings.limit}
    summary = evaluate_harness(model, tokenizer, tasks, manager, output=Path(settings.output), **sizes)
    say(show_harness(summary))
    _say_next(settings, name)
    if as_json:
        print_json(summary | {"output": settings.output})
    return 0


def _own_task(settings: EvaluateSettings):
    """How items of a user's own task are read: as the settings say, or as the adapter's run read its training data."""
    from pathlib import Path

    from ..data import DataSettings
    from ..data.image_sources import folders_of
    from ..evaluation.own_items import OwnTask
    from ..support.outputs import run_of
    from ..support.yaml_text import read_yaml

    prompt, images = settings.prompt, settings.images
    if images is not None:
        folders_of(images, "")  # refuses what is no folder, before a model is loaded
    for run in run_of(settings.adapter):
        recorded = read_yaml(run / "recipe.yaml")
        recorded = recorded if isinstance(recorded, dict) else {}
        if prompt == "auto":
            prompt = "template" if recorded.get("prompt") == "template" else "plain"
        if images is None and isinstance(folder := recorded.get("images"), str) and Path(folder).is_dir():
            images = folder
    reading = DataSettings(data_format=settings.data_format, columns=settings.columns, images=images)
    return OwnTask(tuple(settings.metrics), settings.pattern, settings.function, reading, prompt)


def _score_answers(settings: EvaluateSettings, as_json: bool) -> int:
    """The figures of an answer file, which no model is loaded for."""
    from pathlib import Path

    from ..errors import UserError
    from ..evaluation.answers import evaluate_answers
    from ..evaluation.evaluate import show
    from ..support.folders import refuse_existing
    from ..support.outputs import refuse_inputs

    if settings.model or settings.adapter:
        raise UserError("answers are there already; give one of --answers FILE and --model or --adapter")
    names = [settings.task] if isinstance(settings.task, str) else settings.task
    refuse_existing(Path(settings.output), settings.overwrite)
    refuse_inputs(settings.output, {"the answers": settings.answers, "a task": [name.partition(":")[2] or name for name in names]})
    summary = evaluate_answers(names, Path(settings.answers), Path(settings.output), settings.limit)
    say(show(summary))
    if as_json:
        print_json(summary | {"output": settings.output})
    return 0


def load_both(settings: EvaluateSettings, name: str):
    """(base model `name` with the settings' adapter, its tokenizer, (base model, method, rank))."""
    from .. import baselines
    from ..adapter.attach import record_of
    from ..checkpoint.adapter import load
    from ..checkpoint.quantized import recorded_quantization
    from ..data.image_reader import load_reader
    from ..support.models import load_model

    recorded = recorded_quantization(settings.adapter) if settings.adapter else None
    quantize = (recorded or "none") if settings.quantize == "recorded" else settings.quantize
    trusted = {"trust_remote_code": settings.trust_remote_code}
    tokenizer = load_reader(name, **trusted)
    model = load_model(name, settings.dtype, quantize, **trusted, device=settings.device)
    if not settings.adapter:
        return model, tokenizer, (name, None, None)
    if baselines.is_baseline(settings.adapter):
        return model, tokenizer, (name, baselines.attached(baselines.load(model, settings.adapter)).method, None)
    config = record_of(load(model, settings.adapter, check_base=settings.check_base)).config
    return model, tokenizer, (name, config.method, config.rank)
