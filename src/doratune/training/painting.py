"""Images that a pipeline draws in a run: samples of fixed prompts while it is trained, and images of a class that lack.

Each has a generator of its own on the CPU, by the run's seed and the image's number: the samples of one prompt start from the same
noise at every step and under every method, and no random number of the run is drawn. Source: diffusers' pipelines; the VAE decodes
in fp32. Cost: `denoising_steps` passes of the UNet an image, twice as wide under guidance, on one process while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..support.files import replacing
from .samples import FixedPrompts

FOLDER = "samples"
"""Of a run: where its samples are."""


@torch.no_grad()
def paint(pipeline, prompt: str, settings, seed: int):
    """One image of a prompt, by a pipeline whose networks are in evaluation mode.

    Args:
        settings: anything with `resolution`, `denoising_steps` and `guidance`.
    """
    latents = pipeline(
        prompt,
        height=settings.resolution,
        width=settings.resolution,
        num_inference_steps=settings.denoising_steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    vae = pipeline.vae
    pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return pipeline.image_processor.postprocess(pixels, output_type="pil")[0]


def save_image(image, path: Path) -> None:
    """As PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def fill_class(folder: Path, count: int, pipeline, settings, say: Callable[[str], None]) -> None:
    """Make images of `class_prompt` until a folder has `class_count`.

    Args:
        count: how many it has now.
    """
    wanted = settings.class_count
    if count >= wanted:
        return
    say(f"{folder} has {count} of {wanted} images of {settings.class_prompt!r}: drawing {wanted - count}")
    number = 0
    while count < wanted:
        path = folder / f"class-{settings.seed}-{number:04d}.png"
        if not path.exists():
            save_image(paint(pipeline, settings.class_prompt, settings, settings.seed + number), path)
            count += 1
        number += 1


class ImageSamples(FixedPrompts):
    """Images of fixed prompts, into RUN/samples; their paths, below the run's folder, into the checkpoint and metrics.json."""

    def sample(self, step: int, model) -> list[dict]:
        recipe, training, rows = self.recipe, model.training, []
        model.eval()
        for number, prompt in enumerate(recipe.sample_prompts):
            image = paint(model.pipeline, prompt, recipe, recipe.seed)
            path = Path(FOLDER) / f"step-{step:06d}-{number}.png"
            save_image(image, Path(recipe.output) / path)
            rows.append({"step": step, "prompt": prompt, "image": path.as_posix()})
            self.say(f"step {step}: {prompt!r} -> {path}")
        model.train(training)
        return rows
