"""`doratune export --to gguf | lora-scale | lora`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..support.values import number
from .arguments import parse
from .output import keep_freed_memory, print_json, say, say_next

EXAMPLE = "doratune export --to gguf --type q8_0 --adapter runs/demo/adapter --output my-model"


@dataclass(kw_only=True)
class ExportSettings:
    """Write an adapter, or a model, in a form that engines without DoRA run.

    Args:
        to: gguf (the merged model for llama.cpp and Ollama, with tokenizer, chat template and Modelfile), lora-scale (A, B and one
            factor per output row: exact, for engines that can multiply an output), or lora (plain LoRA by truncated SVD: nearly)
        model: base model: hub id, local folder, or smollm2-135m-instruct; default: the one that the adapter records
        adapter: adapter folder, ours or PEFT's; none, with to gguf: the model as it is
        output: folder of the result
        type: of gguf: f32, f16, bf16 or q8_0
        rank: of lora: the rank of every layer
        error: of lora, instead of rank: the largest relative error of a layer's update; each layer takes the smallest rank
        check_base: refuse a base whose row norms are not those of the base that the adapter was trained on
        overwrite: replace an output folder that doratune wrote
    """

    to: Literal["gguf", "lora-scale", "lora"] = "gguf"
    model: str | None = None
    adapter: str | None = None
    output: str = ""
    type: Literal["f32", "f16", "bf16", "q8_0"] = "f16"
    rank: int | None = number(None, least=1)
    error: float | None = number(None, above=0, below=1)
    check_base: bool = True
    overwrite: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(ExportSettings, argv, "export", EXAMPLE)
    keep_freed_memory()
    from ..checkpoint.adapter import base_model_of
    from ..errors import UserError
    from ..support.outputs import refuse_inputs, run_of

    if not settings.output:
        raise UserError("output is not set; give --output FOLDER")
    if not settings.adapter and (settings.to != "gguf" or not settings.model):
        also = ", or --model M alone for a model as it is" if settings.to == "gguf" else ""
        raise UserError(f"adapter is not set; give --adapter FOLDER{also}")
    if settings.to != "lora" and (settings.rank is not None or settings.error is not None):
        raise UserError("rank and error are for --to lora; drop them or change --to")
    base = settings.model or base_model_of(settings.adapter)
    refuse_inputs(settings.output, {"the model": base, "the adapter": settings.adapter}, run_of(settings.adapter))
    result = {"gguf": _gguf, "lora-scale": _scaled, "lora": _truncated}[settings.to](base, settings)
    if as_json:
        print_json({"to": settings.to, "output": settings.output} | result)
    return 0


def _gguf(base: str, settings: ExportSettings) -> dict:
    from ..export.gguf import export_gguf

    export = export_gguf(base, settings.adapter, settings.output, settings.type, settings.overwrite, settings.check_base)
    for note in export.notes:
        say(f"note: {note}")
    say(f"{export.file}: {export.tensors} tensors, {export.nbytes / 1e6:.1f} MB; a Modelfile for Ollama beside it")
    folder = export.file.parent
    say(f"next: ollama create {folder.name} -f {folder / 'Modelfile'} | llama-cli -m {export.file}")
    return {"file": str(export.file), "bytes": export.nbytes, "notes": export.notes}


def _scaled(base: str, settings: ExportSettings) -> dict:
    from ..export.output_scale import export_scaled

    export = export_scaled(base, settings.adapter, settings.output, settings.overwrite, settings.check_base)
    say(str(export))
    return export.to_dict()


def _truncated(base: str, settings: ExportSettings) -> dict:
    from ..export.truncated import export_truncated

    export = export_truncated(
        base, settings.adapter, settings.output, settings.rank, settings.error, settings.overwrite, settings.check_base
    )
    say(export.table())
    say_next(
        ("evaluate", "--adapter", settings.output, "--task", "my_test.jsonl"),
        ("export", "--to", "gguf", "--adapter", settings.adapter, "--output", "gguf"),
    )
    return export.to_dict()
