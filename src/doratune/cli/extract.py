"""`doratune extract --model BASE --tuned FINETUNED --rank R --output ADAPTER`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..support.values import number
from .arguments import parse
from .output import keep_freed_memory, print_json, progress, say, say_next

EXAMPLE = "doratune extract --model smollm2-135m-instruct --tuned runs/full/model --rank 64 --output my-adapter"


@dataclass(kw_only=True)
class ExtractSettings:
    """Make a DoRA adapter out of a base model and a fully fine-tuned one: magnitudes from the rows, direction by a low-rank fit.

    Args:
        model: base model: hub id, local folder, or smollm2-135m-instruct
        tuned: the same model after full fine-tuning: hub id or local folder
        rank: of every layer
        targets: layers that the adapter has: all-linear, a regex, or a list of names
        also_train: modules that are stored whole, as they are tuned (embed_tokens, norm)
        output: adapter folder
        overwrite: replace an output folder that doratune wrote
    """

    model: str = ""
    tuned: str = ""
    rank: int = number(64, least=1)
    targets: str | list[str] = "all-linear"
    also_train: list[str] = field(default_factory=list)
    output: str = ""
    overwrite: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(ExtractSettings, argv, "extract", EXAMPLE)
    keep_freed_memory()
    from ..errors import UserError
    from ..export.extract import extract
    from ..support.outputs import refuse_inputs, run_of

    for name, what in (("model", "BASE"), ("tuned", "FOLDER"), ("output", "FOLDER")):
        if not getattr(settings, name):
            raise UserError(f"{name} is not set; give --{name} {what}")
    refuse_inputs(settings.output, {"the model": settings.model, "the fine-tuned model": settings.tuned}, run_of(settings.tuned))
    with progress("layers", 0) as advance:
        result = extract(
            settings.model,
            settings.tuned,
            settings.output,
            settings.rank,
            settings.targets,
            settings.also_train,
            settings.overwrite,
            advance,
        )
    say(result.table())
    say(f"adapter written to {settings.output}")
    say_next(
        ("evaluate", "--adapter", settings.output, "--task", "my_test.jsonl"),
        ("merge", "--adapter", settings.output, "--output", "merged"),
    )
    if as_json:
        print_json(result.to_dict() | {"output": settings.output})
    return 0
