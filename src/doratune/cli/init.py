"""`doratune init --model M --data FILE`: a recipe that fits the model, the data and the memory, with the reason of each number."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..data.settings import DataSettings
from ..errors import UserError
from ..support.devices import Device
from ..support.fields import setting_names, with_settings_of
from ..support.values import number
from .arguments import parse
from .inputs import refuse_missing
from .output import print_json, say, say_next

EXAMPLE = "doratune init --model my-model --data my.jsonl --memory 24 --output recipe.yaml"


@dataclass(kw_only=True)
@with_settings_of(DataSettings, after="data")
class InitSettings:
    """Write a recipe for doratune train: what is adapted, at which rank, rate, batch and length, from the model's config, the
    lengths of the data and the memory, with the reason above each. In a terminal, what is missing is asked for.

    Args:
        model: hub id, local folder, or smollm2-135m-instruct
        data: file, folder or hub id, or several, as doratune train takes them, also images of classes or with masks; also the words
            after the command
        prompt: Default: template where the tokenizer has one.
        output: the recipe
        run: folder of the run that the recipe describes; default: runs/ and the name of the data
        memory: of each device in GiB; 0: of this machine's
        device: cpu, cuda, mps or xpu; auto: cuda where memory is given or this machine has a GPU
        quantize: auto (nf4 where the base does not fit otherwise), none, nf4, fp4 or int8
        max_length: longest example in tokens; default: 99 % of the examples fit
        processes: devices, each of which holds a part of the base
        eval_size: examples split off to watch the loss on; default: a twentieth of 100 or more, at most 200
        mirror: base address of a mirror of the published data sets
        trust_remote_code: run the Python code that the model's folder or repository brings
        overwrite: replace a recipe that doratune init wrote
    """

    model: str | None = None
    data: list[str] = field(default_factory=list)
    prompt: Literal["auto", "plain", "published", "template"] = "auto"
    output: str = "recipe.yaml"
    run: str | None = None
    memory: float | None = number(None, least=0)
    device: Device = "auto"
    quantize: Literal["auto", "none", "nf4", "fp4", "int8"] = "auto"
    max_length: int | None = number(None, least=1)
    processes: int = number(1, least=1)
    eval_size: int | None = number(None, least=0)
    mirror: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(InitSettings, argv, "init", EXAMPLE, words="data")
    _ask(settings)
    _check(settings)
    from ..planning.commented import recipe_text
    from ..support.files import replacing

    facts, reading, unusable, start = _start(settings)
    text = recipe_text(_head(settings, start), _recipe(settings, facts, reading, unusable, start))
    with replacing(Path(settings.output)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if unusable:
        say(f"warning: {len(unusable)} items cannot be used and are left out (bad_items: skip); the first: {unusable[0]}")
    say(_summary(start))
    say(f"recipe written to {settings.output}")
    look = ("data", *settings.data, "--model", settings.model, *(("--images", settings.images) if settings.images else ()))
    say_next(*([look] if start.plan.unit == "tokens" else []), ("train", settings.output))
    if as_json:
        chosen = {name: choice.value for name, choice in start.choices.items()}
        print_json({"output": settings.output, "settings": chosen, "plan": start.plan.to_dict()})
    return 0


def _ask(settings: InitSettings) -> None:
    """What is missing, from the terminal."""
    if not sys.stdin.isatty() or (settings.model and settings.data):
        return
    settings.model = settings.model or _answer("model (hub id, folder)", "smollm2-135m-instruct")
    settings.data = settings.data or [_answer("data (file, folder, hub id)", "")]
    if settings.memory is None and (memory := _answer("memory of the device in GiB (0: this machine's)", "0")):
        try:
            settings.memory = float(memory)
        except ValueError:
            raise UserError(f"memory is {memory!r}; expected a number, 0 or more") from None
        if not 0 <= settings.memory < float("inf"):
            raise UserError(f"memory is {memory}; expected a number, 0 or more")
    settings.data = [source for source in settings.data if source]


def _answer(question: str, default: str) -> str:
    print(f"{question}{f' [{default}]' * bool(default)}: ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip() or default
    except EOFError:
        return default


def _check(settings: InitSettings) -> None:
    from ..planning.commented import MARK
    from ..support.outputs import refuse_inputs

    if not settings.model:
        raise UserError("model is not set; give --model M: a hub id, a folder, or smollm2-135m-instruct")
    if not settings.data:
        raise UserError("data is not set; give --data FILE, a folder or a hub id")
    refuse_missing({"data": settings.data})
    output = Path(settings.output)
    refuse_inputs(output, {"the model": settings.model, "the data": settings.data})
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"output is {settings.output!r}; give a name that ends in .yaml")
    if output.exists() and not settings.overwrite:
        raise UserError(f"{output} exists; give another --output, or pass --overwrite")
    if output.is_file() and MARK.encode() not in output.read_bytes()[:2000]:
        raise UserError(f"{output} is no recipe of doratune init, so --overwrite does not replace it; give another name")


def _wish(settings: InitSettings):
    import torch

    from ..planning.start import RunWish

    device = settings.device
    if device == "auto":
        device = "cuda" if settings.memory or torch.cuda.is_available() else "cpu"
    limits = (settings.quantize, settings.processes, settings.max_length, settings.trust_remote_code)
    return RunWish(settings.model, settings.memory or 0.0, device, *limits)


def _start(settings: InitSettings):
    """(facts of the data, how it is read, lines of items that cannot be used, settings that fit)."""
    from ..planning.configs import config_of
    from ..planning.image_start import image_facts, image_start_of
    from ..planning.start import start_of

    config = config_of(settings.model, settings.trust_remote_code)
    images = image_facts(settings.model, settings.data, config, dict(settings.columns), say)
    if images is not None:
        return images, DataSettings(columns=settings.columns), images.unusable, image_start_of(_wish(settings), images, config)
    facts, reading, unusable = _facts(settings)
    return facts, reading, unusable, start_of(_wish(settings), facts, config)


def _facts(settings: InitSettings):
    """(facts of the data, how it is read, lines of items that cannot be used)."""
    from ..data import load_items, recognition
    from ..data.image_reader import load_reader
    from ..planning.lengths import data_facts, in_the_template

    tokenizer = load_reader(settings.model, settings.trust_remote_code)
    reading = {name: getattr(settings, name) for name in setting_names(DataSettings)}
    reading = DataSettings(**reading | ({"prompt": "plain"} if settings.prompt == "auto" else {}))
    unusable: list[str] = []
    items, kind = load_items(settings.data, settings.mirror, unusable=unusable, settings=reading)
    say(recognition(kind, settings.data_format))
    if settings.prompt == "auto" and in_the_template(items[0], kind, tokenizer, reading):
        reading = dataclasses.replace(reading, prompt="template")
    return data_facts(items, kind, tokenizer, reading, unusable), reading, unusable


def _recipe(settings: InitSettings, facts, reading: DataSettings, unusable: list[str], start) -> dict:
    """The settings in the order in which they are read."""
    from ..planning.start import Chosen
    from ..training.recipe import TrainRecipe

    eval_size = settings.eval_size
    held_out = getattr(facts, "held_out", False) and eval_size is None
    if eval_size is None:
        eval_size = min(200, facts.examples // 20) if facts.examples >= 100 else 0
    head = {
        "source": f"doratune init: {settings.model}, {facts.examples} examples, {start.memory:.4g} GiB",
        "model": settings.model,
        "data": settings.data[0] if len(settings.data) == 1 else settings.data,
        "output": settings.run or _free_run(settings.data[0]),
    }
    template = "the tokenizer's chat template, which the model's users will have" if reading.prompt == "template" else ""
    for f in dataclasses.fields(DataSettings):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        if (value := getattr(reading, f.name)) != default:
            head[f.name] = Chosen(value, template if f.name == "prompt" else "")
    if settings.mirror:
        head["mirror"] = settings.mirror
    if unusable:
        head["bad_items"] = Chosen("skip", f"{len(unusable)} items cannot be used: doratune data shows which, and why")
    if (objective := start.plan.settings.objective) != TrainRecipe.objective:
        head["objective"] = Chosen(objective, f"what the data are, {facts.classes} classes, and what the model can have a head for")
    if held_out:
        head["eval_data"] = Chosen(settings.data[0], "its part val")
        head["best_by"] = Chosen("loss", "the result is the checkpoint with the lowest loss on that")
    elif eval_size:
        head["eval_size"] = Chosen(eval_size, "split off, to see the loss on what is not trained on")
        head["best_by"] = Chosen("loss", "the result is the checkpoint with the lowest loss on those")
    if settings.device != "auto":
        head["device"] = settings.device
    if settings.trust_remote_code:
        head["trust_remote_code"] = True
    return head | start.choices


def _free_run(source: str) -> str:
    """runs/NAME of the data, with a number where that is taken."""
    name = re.sub(r"[^\w-]+", "-", Path(source).name.split(".")[0]).strip("-") or "mine"
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(f"runs/{name}" for name in names if not Path("runs", name).exists())


def _head(settings: InitSettings, start) -> list[str]:
    from .. import __version__
    from ..planning.commented import MARK

    return [
        f"{MARK.removeprefix('# ')} {__version__}: doratune train {settings.output}",
        _summary(start),
        "The reason for each number stands above it. Change what you like: doratune plan says what a change costs in memory.",
    ]


def _summary(start) -> str:
    s = start.plan.settings
    known = f"{start.plan.total / 2**30:.2f} GiB planned" if not start.plan.uncounted else "memory not known, one example at a time"
    devices = f"{s.processes} x " if s.processes > 1 else ""
    each = f"examples of up to {s.max_length} tokens" if start.plan.unit == "tokens" else start.plan.unit
    return (
        f"{s.method} rank {s.rank}, base in {s.quantize if s.quantize != 'none' else s.dtype}, "
        f"{s.batch_size} x {s.gradient_accumulation} {each} a step: {known} of "
        f"{devices}{start.memory:.4g} on {s.device}"
    )
