"""`doratune inspect`: what an adapter adapts in a model, and which rows of its weights have no direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import AdapterConfig
from ..support.fields import setting_names, with_settings_of
from .arguments import parse
from .output import keep_freed_memory, print_json, say, say_next

EXAMPLE = "doratune inspect --model smollm2-135m-instruct --targets q_proj,v_proj --rank 8"

OF_A_CONFIG = setting_names(AdapterConfig)


@dataclass(kw_only=True)
@with_settings_of(AdapterConfig, after="adapter")
class InspectSettings:
    """Show what is adapted (module, kind, base, direction, rank, trainable numbers, rows without direction) and what is left out.

    Args:
        model: hub id, local folder, or smollm2-135m-instruct; default: the adapter's base model
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
    from ..adapter.attach import attach
    from ..adapter.inspect import inspect
    from ..checkpoint.adapter import base_model_of, load
    from ..checkpoint.base_model import load_base
    from ..checkpoint.quantized import recorded_quantization
    from ..errors import UserError

    if not settings.model and not settings.adapter:
        raise UserError("neither model nor adapter is set; give --model M, --adapter FOLDER, or both")
    if settings.adapter and (idle := [n for n in OF_A_CONFIG if getattr(settings, n) != getattr(InspectSettings(), n)]):
        raise UserError(f"{', '.join(idle)}: with --adapter the folder says it; drop --adapter or these settings")
    if not settings.adapter:
        config = AdapterConfig(**{name: getattr(settings, name) for name in OF_A_CONFIG})
    name = settings.model or base_model_of(settings.adapter)
    recorded = recorded_quantization(settings.adapter) if settings.adapter else None
    quantize = (recorded if settings.quantize == "none" else None) or settings.quantize
    model = load_base(name, settings.adapter, settings.dtype, quantize, settings.trust_remote_code)
    if settings.adapter:
        load(model, settings.adapter, trainable=True, check_base=settings.check_base)
    else:
        attach(model, config)
    inspection = inspect(model)
    say(inspection.table())
    if settings.adapter:
        say_next(
            ("evaluate", "--adapter", settings.adapter, "--task", "my_test.jsonl"),
            ("merge", "--adapter", settings.adapter, "--output", "merged"),
        )
    else:
        say_next(("init", "my.jsonl", "--model", name))
    if as_json:
        print_json(inspection.to_dict() | {"model": name})
    return 0
