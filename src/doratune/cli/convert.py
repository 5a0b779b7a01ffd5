"""`doratune convert --adapter A --to FORMAT --output OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .arguments import parse
from .output import print_json, say, say_next

EXAMPLE = "doratune convert --adapter style.safetensors --to peft --output style --model stable-diffusion --component unet"


@dataclass(kw_only=True)
class ConvertSettings:
    """Write an adapter in another format: PEFT, kohya and LyCORIS, diffusers, torchtune, mlx-lm, ai-toolkit, the authors'.

    Args:
        adapter: a folder or a file of any of these formats, which is found out
        to: peft, doratune, kohya, ai-toolkit, torchtune, mlx, authors or diffusers
        output: a folder; or a name that ends in .safetensors, where the format is one file
        model: base model, where the format leaves names, heads or widths to it: hub id, local folder (a pipeline's too), or
            smollm2-135m-instruct
        component: of a pipeline's files: unet, transformer, text_encoder, text_encoder_2
        magnitude_axis: output or input, where the file leaves it open
        alpha: of the scaling alpha / rank, where the file leaves it open
        overwrite: replace an output that doratune wrote
    """

    adapter: str = ""
    to: str = ""
    output: str = ""
    model: str | None = None
    component: str | None = None
    magnitude_axis: Literal["output", "input"] | None = None
    alpha: float | None = None
    overwrite: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(ConvertSettings, argv, "convert", EXAMPLE)
    from ..checkpoint.convert import convert
    from ..errors import UserError

    for name in ("adapter", "to", "output"):
        if not getattr(settings, name):
            raise UserError(f"{name} is not set; give --{name}")
    done = convert(
        settings.adapter,
        settings.to,
        settings.output,
        model=settings.model,
        component=settings.component,
        magnitude_axis=settings.magnitude_axis,
        alpha=settings.alpha,
        overwrite=settings.overwrite,
    )
    say(f"{done.source_format} → {done.target_format}: {done.modules} modules, {done.tensors} tensors written to {done.output}")
    if done.left_behind:
        say(f"left behind, of training only: {', '.join(done.left_behind)}")
    if done.target_format in ("peft", "doratune"):
        say_next(
            ("inspect", "--adapter", done.output, "--model", settings.model or "BASE"),
            ("merge", "--adapter", done.output, "--model", settings.model or "BASE"),
        )
    if as_json:
        print_json(done.__dict__)
    return 0
