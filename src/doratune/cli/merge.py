"""`doratune merge --model M --adapter A --output OUT`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .arguments import parse
from .output import keep_freed_memory, print_json, say, say_next

EXAMPLE = "doratune merge --model smollm2-135m-instruct --adapter runs/demo/adapter --output my-model --dtype bfloat16"


@dataclass(kw_only=True)
class MergeSettings:
    """Merge an adapter into its base model: an ordinary folder of transformers or diffusers, no adapter code needed to run it. An
    adapter of a pipeline becomes the whole pipeline.

    Args:
        model: base model: hub id, local folder, or smollm2-135m-instruct; default: the one that the adapter records
        adapter: adapter folder, ours or PEFT's
        output: folder of the merged model
        dtype: dtype of the result; none keeps the base's
        into: for adapters trained on a quantized base: dequantized (16 bit, what was trained; the default), original (the base
            before quantization), or same (quantized again)
        check_base: refuse a base whose row norms are not those of the base that the adapter was trained on
        check: compare logits of base + adapter and of the result (loads both models, one after the other)
        overwrite: replace an output folder that doratune wrote
    """

    model: str | None = None
    adapter: str = ""
    output: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    into: Literal["dequantized", "original", "same"] | None = None
    check_base: bool = True
    check: bool = True
    overwrite: bool = False


class Disagreement(Exception):
    """The merged model is not base + adapter."""


def main(argv: list[str]) -> int:
    settings, as_json = parse(MergeSettings, argv, "merge", EXAMPLE)
    keep_freed_memory()
    from ..checkpoint.adapter import base_model_of
    from ..checkpoint.merge import merge_checkpoint
    from ..checkpoint.quantized import recorded_quantization
    from ..errors import UserError
    from ..support.outputs import refuse_inputs, run_of
    from ..support.pipelines import is_pipeline_adapter

    for name in ("adapter", "output"):
        if not getattr(settings, name):
            raise UserError(f"{name} is not set; give --{name} FOLDER")
    if is_pipeline_adapter(settings.adapter):
        return _merge_pipeline(settings, as_json)
    base = settings.model or base_model_of(settings.adapter)
    refuse_inputs(settings.output, {"the model": base, "the adapter": settings.adapter}, run_of(settings.adapter))
    if settings.into or recorded_quantization(settings.adapter):
        return _merge_quantized(base, settings, as_json)
    result = {"output": settings.output}

    def check(merged: Path) -> None:
        result.update(_compared(base, settings.adapter, merged, settings))

    def merge() -> Path:
        checked = check if settings.check else None
        return merge_checkpoint(
            base, settings.adapter, settings.output, settings.dtype, settings.overwrite, checked, settings.check_base
        )

    return _finished(merge, result, as_json)


def _compared(base: str, adapter: str | Path, merged: Path, settings: MergeSettings) -> dict:
    """What the merged model says, held against base + adapter.

    Raises:
        Disagreement: it says something else.
    """
    from ..checkpoint.logits import agreement
    from ..checkpoint.merge import base_folder, stored_dtype

    compared = agreement(base, adapter, merged, settings.dtype or stored_dtype(base_folder(base)))
    if compared is None:
        say("not compared: no input could be made from the model's config; run base + adapter and the result on one of yours")
        return {"ok": None}
    say(str(compared))
    if not compared.ok:
        raise Disagreement(f"the merged model differs from base + adapter; nothing was written to {settings.output}")
    return {**compared.__dict__, "ok": True}


def _finished(merge: Callable[[], Path], result: dict, as_json: bool) -> int:
    """The exit status of a merge, which is done here, and what is said of it."""
    try:
        output = merge()
    except Disagreement as error:
        print(f"doratune merge: {error}", file=sys.stderr)
        return 1
    say(f"merged model written to {output}")
    _say_next(Path(output))
    if as_json:
        print_json(result)
    return 0


def _merge_pipeline(settings: MergeSettings, as_json: bool) -> int:
    from ..checkpoint.pipelines import merge_pipeline, pipeline_record
    from ..errors import UserError
    from ..support.outputs import refuse_inputs, run_of

    if settings.into:
        raise UserError(f"into is {settings.into!r}, which is for quantized bases, and pipelines are trained dense; drop it")
    adapter = Path(settings.adapter)
    base = settings.model or pipeline_record(adapter)[0]
    refuse_inputs(settings.output, {"the model": base, "the adapter": settings.adapter}, run_of(adapter))
    result: dict = {"output": settings.output, "parts": {}}

    def check(part: Path, own: Path, merged: Path) -> None:
        say(f"{part.name}:")
        result["parts"][part.name] = _compared(str(part), own, merged, settings)

    def merge() -> Path:
        output, checked = Path(settings.output), check if settings.check else None
        return merge_pipeline(base, adapter, output, settings.dtype, settings.overwrite, checked, settings.check_base)

    return _finished(merge, result, as_json)


def _merge_quantized(base: str, settings: MergeSettings, as_json: bool) -> int:
    from ..checkpoint.quantized import merge_quantized

    into, dtype = settings.into or "dequantized", settings.dtype or "bfloat16"
    difference = merge_quantized(
        base, settings.adapter, settings.output, into, dtype, settings.overwrite, settings.check, settings.check_base
    )
    say(f"merged model written to {settings.output}")
    if difference is not None:
        say(str(difference))
    _say_next(Path(settings.output))
    if as_json:
        print_json({"output": settings.output, "into": into, **(difference.__dict__ if difference else {})})
    return 0


def _say_next(output: Path) -> None:
    from ..support.model_folders import architecture_of
    from ..support.own_models import is_own

    speaks = (output / "tokenizer_config.json").is_file() and not is_own(architecture_of(str(output)))
    for_text = [("chat", "--model", output), ("export", "--to", "gguf", "--model", output, "--output", f"{output}-gguf")]
    say_next(*for_text * speaks, ("push", "--folder", output, "--to", "OWNER/NAME"))
