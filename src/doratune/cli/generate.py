"""`doratune generate PROMPTS.jsonl --adapter A --output answers.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from ..support.devices import Device
from ..support.values import number
from .arguments import parse
from .inputs import refuse_missing
from .output import keep_freed_memory, print_json, progress, say, say_next
from .repeated import gathered

EXAMPLE = "doratune generate --prompts questions.jsonl --adapter runs/demo/adapter --output answers.jsonl"


@dataclass(kw_only=True)
class GenerateSettings:
    """Write a model's answers to many prompts: one JSON object a line, in the prompts' order.

    Args:
        prompts: a .txt file (a prompt a line), or .jsonl or .json with `prompt`, `messages`, or `instruction` and `input`
        prompt: or one prompt
        model: hub id, local folder, or smollm2-135m-instruct; default: the base model that the first adapter records
        adapter: adapter folders, or NAME=FOLDER; with several, each prompt is answered by each
        compare: the base model's answers besides
        template: chat (the tokenizer's), instruction (as instruction data is trained), plain, or auto (by the prompt)
        system: system prompt of conversations that have none
        temperature: 0 takes the most probable token
        top_p: only the most probable tokens that make up this share
        max_new_tokens: longest answer
        seed: of sampling
        batch_size: prompts at once
        limit: only the first so many prompts
        dtype: dtype of the model
        device: cpu, cuda, mps or xpu; auto: the accelerator where there is one
        check_base: refuse a base whose row norms are not those of the base that the adapter was trained on
        quantize: recorded (as the adapters were trained), none, nf4, fp4 or int8
        trust_remote_code: run the Python code that the model's folder or repository brings
        output: .jsonl file; none prints the answers
        overwrite: replace an output file that exists
    """

    prompts: str | None = None
    prompt: str | None = None
    model: str | None = None
    adapter: list[str] = field(default_factory=list)
    compare: bool = False
    template: Literal["auto", "chat", "instruction", "plain"] = "auto"
    system: str | None = None
    temperature: float = number(0.0, least=0)
    top_p: float = number(1.0, above=0, most=1)
    max_new_tokens: int = number(256, least=1)
    seed: int = number(0, least=0)
    batch_size: int = number(8, least=1)
    limit: int | None = number(None, least=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Device = "auto"
    check_base: bool = True
    quantize: Literal["recorded", "none", "nf4", "fp4", "int8"] = "recorded"
    trust_remote_code: bool = False
    output: str | None = None
    overwrite: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(GenerateSettings, gathered(argv, "adapter"), "generate", EXAMPLE)
    keep_freed_memory()
    from pathlib import Path

    from ..errors import UserError
    from ..generation.adapters import BASE, NamedAdapters, named
    from ..generation.prompts import read_prompts, rendered_all
    from ..generation.sampling import Sampling, answers, check_lengths
    from ..support.files import replacing
    from ..support.outputs import refuse_inputs, run_of

    if (settings.prompts is None) == (settings.prompt is None):
        raise UserError("give one of --prompts FILE and --prompt TEXT")
    refuse_missing({"prompts": settings.prompts}, {"adapter": list(named(settings.adapter).values())})
    output = Path(settings.output) if settings.output else None
    if output is not None:
        folders = list(named(settings.adapter).values())
        inputs = {"the model": settings.model, "an adapter": folders, "the prompts": settings.prompts}
        refuse_inputs(output, inputs, [run for folder in folders for run in run_of(folder)])
    if output is not None and output.exists() and (not settings.overwrite or not output.is_file()):
        raise UserError(f"{output} exists; give another file" + (" or pass --overwrite" if output.is_file() else ""))
    sampling = Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, settings.seed)
    items = [{"prompt": settings.prompt}] if settings.prompts is None else read_prompts(Path(settings.prompts))
    items = items[: settings.limit]
    adapters = NamedAdapters(
        settings.model,
        settings.adapter,
        settings.dtype,
        settings.quantize,
        settings.trust_remote_code,
        settings.check_base,
        settings.device,
    )
    ids = rendered_all(items, adapters.tokenizer, settings.template, settings.system)
    check_lengths(ids, adapters.model, sampling.max_new_tokens)
    speakers = ([BASE] if settings.compare or not adapters.folders else []) + list(adapters.folders)
    columns = []
    for speaker in speakers:
        model = adapters.use(speaker)
        with progress(speaker, len(items)) as advance:
            columns.append(answers(model, adapters.tokenizer, ids, sampling, settings.batch_size, advance))
    rows = [
        json.dumps({**item, "adapter": speaker, "output": a.text, "tokens": a.tokens, "finish": a.finish}, ensure_ascii=False)
        for item, row in zip(items, zip(*columns, strict=True), strict=True)
        for speaker, a in zip(speakers, row, strict=True)
    ]
    if output is None:
        say("\n".join(rows))
    else:
        with replacing(output) as temporary:
            temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")
        say(f"{len(rows)} answers written to {output}")
        for folder in list(adapters.folders.values())[:1]:
            say_next(("evaluate", "--adapter", folder, "--task", "my_test.jsonl"), ("chat", "--adapter", folder))
    if as_json:
        print_json({"output": settings.output, "prompts": len(items), "adapters": speakers, "answers": len(rows)})
    return 0
