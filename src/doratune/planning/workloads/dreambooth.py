"""Images of a thing under their prompts: the UNet of a pipeline over latents, its text encoders where they are trained.

A step reads `batch_size` latents of `resolution` pixels, and as many of the class where there are class images. Text encoders
that are frozen and the VAE lie on the device all the same: `bytes_beside`. Between steps the VAE decodes a sample or an image of
the class, before them it encodes each image: in fp32, which may take more than a step. Source: diffusers' modules,
`training/denoising.py`. Cost: building on the meta device.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from ...support.pipeline_shapes import PipelineConfigs, pipeline_configs, pipeline_skeleton
from ...support.pipelines import TEXT_ENCODERS, latent_side, takes_sizes, text_encoders
from ...training.denoising import Denoiser, StepNoise
from . import ScoreShape, Workload

PROMPT = "a photo of a thing"


class ShapedDenoiser(Denoiser):
    """A Denoiser that reads prompts of the right length without a tokenizer."""

    def _encoded(self, prompt: str) -> tuple[Tensor, ...]:
        if prompt in self.encoded:
            return self.encoded[prompt]
        states, pooled = [], None
        for encoder in text_encoders(self.pipeline).values():
            tokens = torch.zeros(1, encoder.config.max_position_embeddings, dtype=torch.long)
            out = encoder(tokens, output_hidden_states=self.sized)
            pooled = out[0]
            states.append(out.hidden_states[-2] if self.sized else out[0])
        return (torch.cat(states, -1), pooled) if self.sized else (states[0],)


class DreamBoothWorkload(Workload):
    """Text-to-image pipelines."""

    objective = "dreambooth"
    unit = "images"
    least_length = math.inf
    can_quantize = False

    def __init__(self, recipe, config: PipelineConfigs):
        super().__init__(recipe, config)
        self.pipeline: SimpleNamespace = pipeline_skeleton(config, self.dtype)
        self.of_training.pipeline = self.pipeline
        self.side = latent_side(self.pipeline, recipe.resolution, recipe.model)
        self.trains_text = recipe.text_encoders == "adapted"
        self.each = 2 if recipe.class_images else 1
        self.between_steps = "decoding" if recipe.sample_prompts or recipe.class_images else "encoding"

    @classmethod
    def read_config(cls, recipe):
        return pipeline_configs(recipe.model)

    def skeleton(self):
        recipe = self.recipe
        return ShapedDenoiser(self.pipeline, self.trains_text, StepNoise(recipe.seed), recipe.prior_weight, recipe.snr_gamma)

    def dense(self, model):
        return ()

    def bytes_beside(self) -> int:
        inside = {"unet", *(TEXT_ENCODERS if self.trains_text else ())}
        others = (module for part, module in self.pipeline.components.items() if part not in inside)
        return sum(t.nbytes for module in others for t in (*module.parameters(), *module.buffers()))

    def inputs(self, model, examples, length, answer):
        count, side = self.each * examples, self.side
        mean, deviation = (torch.empty(count, self.pipeline.vae.config.latent_channels, side, side) for _ in range(2))
        if not self.trains_text:
            model.encoded = {PROMPT: self._states(model)}
        self.vae = model.pipeline.vae.to_empty(device="cpu")
        sizes = torch.zeros(count, 6)
        return {"mean": mean, "deviation": deviation, "prompts": [PROMPT] * count, "instances": examples, "sizes": sizes}

    def _states(self, model) -> tuple[Tensor, ...]:
        """What frozen encoders made of a prompt."""
        encoders = [config for _, config in self.config.encoders.values()]
        text = torch.empty(1, encoders[0].max_position_embeddings, sum(one.hidden_size for one in encoders), dtype=model.dtype)
        return (text, torch.empty(1, encoders[-1].projection_dim, dtype=model.dtype)) if takes_sizes(self.pipeline) else (text,)

    def work_between_steps(self):
        if self.between_steps == "decoding":
            self.vae.decode(torch.empty(1, self.vae.config.latent_channels, self.side, self.side))
        else:
            self.vae.encode(torch.empty(1, self.vae.config.in_channels, *(self.recipe.resolution,) * 2))

    def scores(self, model, examples, length, answer):
        return ScoreShape(1, 2**62)  # nothing has an entry for an answer

    def units(self, settings):
        return settings.batch_size * self.each

    def example(self, settings):
        return f"one image of {settings.resolution} x {settings.resolution}"

    def shown(self, settings):
        pairs = " and as many of its class" if self.each == 2 else ""
        return f"{settings.batch_size} images of {settings.resolution} x {settings.resolution}{pairs}"


WORKLOAD = DreamBoothWorkload
