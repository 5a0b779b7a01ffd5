"""`doratune inspect`: what an adapter adapts in a model or in each part of a text-to-image pipeline, and which rows of its weights
have no direction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..config import AdapterConfig
from ..support.fields import setting_names, with_settings_of
from .arguments import parse
from .output import keep_freed_memory, print_json, say, say_next

if TYPE_CHECKING:
    from torch import nn

EXAMPLE = "doratune inspect --model smollm2-135m-instruct --targets q_proj,v_proj --rank 8"

OF_A_CONFIG = setting_names(AdapterConfig)


@dataclass(kw_only=True)
@with_settings_of(AdapterConfig, after="adapter")
class InspectSettings:
    """Show what is adapted (module, kind, base, direction, rank, trainable numbers, rows without direction) and what is left out.

    Args:
        model: hub id, local folder (of a pipeline of diffusers too), or smollm2-135m-instruct; default: the adapter's base model
        adapter: show this adapter folder instead of the settings below
        check_base: refuse a base whose row norms are not those of the base that the adapter was trained on
        quantize: look at the base in 4 or 8 bits: none, nf4, fp4 or int8; with an adapter, none is what it was trained on
        dtype: dtype of the model
        trust_remote_code: run the Python code that the model's folder or repository brings
    """

    model: str | None = None
    adapter: str | None = None
    check_base: bool = True
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    trust_remote_code: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(InspectSettings, argv, "inspect", EXAMPLE)
    keep_freed_memory()
    from ..adapter.inspect import inspect
    from ..support.pipelines import is_pipeline, is_pipeline_adapter

    _refuse_unset(settings)
    of_pipeline = is_pipeline_adapter(settings.adapter) if settings.adapter else is_pipeline(settings.model)
    name, parts = (_adapted_pipeline if of_pipeline else _adapted_model)(settings)
    inspections = {part: inspect(model) for part, model in parts.items()}
    for part, inspection in inspections.items():
        say(f"{part}:\n{inspection.table()}" if part else inspection.table())
    _say_next(settings, name, of_pipeline)
    if as_json:
        rows = {part: inspection.to_dict() for part, inspection in inspections.items()}
        print_json({"parts": rows, "model": name} if of_pipeline else rows[""] | {"model": name})
    return 0


def _refuse_unset(settings: InspectSettings) -> None:
    from ..errors import UserError

    if not settings.model and not settings.adapter:
        raise UserError("neither model nor adapter is set; give --model M, --adapter FOLDER, or both")
    if settings.adapter and (idle := [n for n in OF_A_CONFIG if getattr(settings, n) != getattr(InspectSettings(), n)]):
        raise UserError(f"{', '.join(idle)}: with --adapter the folder says it; drop --adapter or these settings")


def _config(settings: InspectSettings) -> AdapterConfig:
    return AdapterConfig(**{name: getattr(settings, name) for name in OF_A_CONFIG})


def _adapted_model(settings: InspectSettings) -> tuple[str, dict[str, nn.Module]]:
    """(name of the base, {"": the adapted model})."""
    from ..adapter.attach import attach
    from ..checkpoint.adapter import base_model_of, load
    from ..checkpoint.base_model import load_base
    from ..checkpoint.quantized import recorded_quantization

    config = None if settings.adapter else _config(settings)
    name = settings.model or base_model_of(settings.adapter)
    recorded = recorded_quantization(settings.adapter) if settings.adapter else None
    quantize = (recorded if settings.quantize == "none" else None) or settings.quantize
    model = load_base(name, settings.adapter, settings.dtype, quantize, settings.trust_remote_code)
    if config:
        attach(model, config)
    else:
        load(model, settings.adapter, trainable=True, check_base=settings.check_base)
    return name, {"": model}


def _adapted_pipeline(settings: InspectSettings) -> tuple[str, dict[str, nn.Module]]:
    """(name of the pipeline, its adapted parts); without an adapter its UNet, whose layers are named as a run names them."""
    from torch import nn

    from ..adapter.attach import attach
    from ..checkpoint.adapter import load
    from ..checkpoint.pipelines import pipeline_record
    from ..errors import UserError, listed
    from ..support.pipelines import load_pipeline, networks

    if settings.quantize != "none":
        raise UserError(f"quantize is {settings.quantize!r}, which is not for text-to-image pipelines; drop it")
    if not settings.adapter:
        config = _config(settings)
        unet = nn.ModuleDict({"unet": load_pipeline(settings.model, settings.dtype).unet})
        attach(unet, config)
        return settings.model, {"unet": unet}
    base, parts = pipeline_record(Path(settings.adapter))
    name = settings.model or base
    there = networks(load_pipeline(name, settings.dtype))
    if missing := [part for part in parts if part not in there]:
        raise UserError(
            f"{name} has no {listed(missing)}, of which {settings.adapter} holds an adapter; give the pipeline under it"
        )
    for part in parts:
        load(there[part], Path(settings.adapter) / part, trainable=True, check_base=settings.check_base)
    return name, {part: there[part] for part in parts}


def _say_next(settings: InspectSettings, name: str, of_pipeline: bool) -> None:
    from ..support.pipelines import TEXT_ENCODERS

    merging = ("merge", "--adapter", settings.adapter, "--output", "merged")
    if settings.adapter:
        say_next(*([] if of_pipeline else [("evaluate", "--adapter", settings.adapter, "--task", "my_test.jsonl")]), merging)
    elif of_pipeline:
        recipe = "sdxl" if (Path(name) / TEXT_ENCODERS[1]).is_dir() else "sd15"
        say_next(("train", f"recipes/dreambooth_{recipe}.yaml", "--model", name, "--data", "photos"))
    else:
        say_next(("init", "my.jsonl", "--model", name))
