"""The loss of a text-to-image pipeline: noise is added to an image's latent, and the UNet says what it was.

    z_t = √ᾱ_t · z + √(1 − ᾱ_t) · ε        loss = mean |target − UNet(z_t, t, text)|²
    target = ε, or the velocity √ᾱ_t · ε − √(1 − ᾱ_t) · z, as the pipeline's scheduler was trained (Ho 2020; Salimans 2022)

Noise, time and the VAE's own draw are those of a step: a generator on the CPU whose seed is (run, step, batch of the step,
process). So a resumed run draws what it would have drawn, samples in between change nothing, and a GPU sees the noise that a CPU
sees. Source: diffusers' schedulers and pipelines. Cost: one pass of the UNet; prompts of frozen text encoders are encoded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from ..support.pipelines import noise_schedule, takes_sizes, text_encoders
from ..support.processes import average, rank

LOSSES = ("instance_loss", "prior_loss")


class StepNoise(TrainerCallback):
    """Where a run is, as the seed of its random numbers."""

    def __init__(self, seed: int):
        self.seed, self.step, self.batch = seed, 0, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.step, self.batch = state.global_step, 0

    def generator(self) -> torch.Generator:
        """Of the next batch of this step."""
        place = f"{self.seed} {self.step} {self.batch} {rank()}"
        self.batch += 1
        return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=4).digest(), "big"))


class Denoiser(nn.Module):
    """What is trained of a pipeline: its UNet, and its text encoders where they are; under the names that they have there.

    Args:
        pipeline: of `support.pipelines.load_pipeline`. text: are the text encoders trained?
        prior_weight: of the class's loss. snr_gamma: 0, or the largest weight of a step by its signal to noise.
    """

    def __init__(self, pipeline, text: bool, noise: StepNoise, prior_weight: float = 1.0, snr_gamma: float = 0.0):
        super().__init__()
        self.pipeline, self.noise, self.text = pipeline, noise, text
        self.prior_weight, self.snr_gamma = prior_weight, snr_gamma
        self.unet = pipeline.unet
        for part, module in text_encoders(pipeline).items() if text else ():
            self.add_module(part, module)
        self.schedule, self.sized = noise_schedule(pipeline), takes_sizes(pipeline)
        self.dtype = pipeline.unet.dtype
        self.encoded: dict[str, tuple[Tensor, ...]] = {}
        self.seen: dict[str, list[Tensor]] = {name: [] for name in LOSSES}

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def forward(self, mean: Tensor, deviation: Tensor, prompts: Sequence[str], instances: int, sizes: Tensor) -> dict[str, Tensor]:
        """The loss of a batch, the images of the thing first.

        Args:
            mean, deviation: (N, C, h, w) of the latents' distribution. instances: how many of the N are the thing's.
            sizes: (N, 6), height and width of the file, top and left of the crop, height and width of what is trained on.
        """
        generator = self.noise.generator() if self.training else torch.Generator().manual_seed(self.noise.seed)
        each = self.errors(mean, deviation, prompts, sizes, generator)
        parts = dict(zip(LOSSES, (each[:instances].mean(), each[instances:].mean())))
        if instances == len(each):
            del parts["prior_loss"]
        if self.training:
            for name, value in parts.items():
                self.seen[name].append(value.detach())
        return {"loss": parts["instance_loss"] + self.prior_weight * parts.get("prior_loss", 0.0), **parts}

    def errors(self, mean: Tensor, deviation: Tensor, prompts: Sequence[str], sizes: Tensor, generator: torch.Generator) -> Tensor:
        """(N,) in fp32: the squared error of each image, at a time and under noise that are drawn here."""
        steps = self.schedule.config.num_train_timesteps
        times = torch.randint(steps, (len(mean),), generator=generator).to(mean.device)
        draw, noise = (torch.randn(mean.shape, generator=generator).to(mean.device) for _ in range(2))
        latents = (mean + deviation * draw) * self.pipeline.vae.config.scaling_factor
        noisy = self.schedule.add_noise(latents, noise, times)
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(latents, noise, times) if velocity else noise
        said = self.unet(noisy.to(self.dtype), times, **self.conditions(prompts, sizes)).sample
        each = (said.float() - target).square().flatten(1).mean(1)
        return each * self._weights(times, velocity) if self.snr_gamma else each

    def conditions(self, prompts: Sequence[str], sizes: Tensor) -> dict:
        """What the UNet is told beside the latent."""
        rows = [self._encoded(prompt) for prompt in dict.fromkeys(prompts)]
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        order = [place[prompt] for prompt in prompts]
        text, *pooled = (torch.cat(parts)[order].to(self.device, self.dtype) for parts in zip(*rows))
        if not self.sized:
            return {"encoder_hidden_states": text}
        return {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": sizes.to(text.dtype)}}

    def encode(self, prompts: Iterable[str]) -> None:
        """Hold what frozen text encoders make of these prompts."""
        with torch.no_grad():
            self.encoded |= {prompt: self._encoded(prompt) for prompt in prompts}

    def _encoded(self, prompt: str) -> tuple[Tensor, ...]:
        """(states (1, T, D),), of SDXL also the pooled text (1, P)."""
        if prompt in self.encoded:
            return self.encoded[prompt]
        states = self.pipeline.encode_prompt(prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return (states[0], states[2]) if self.sized else (states[0],)

    def _weights(self, times: Tensor, velocity: bool) -> Tensor:
        """min(SNR, γ) / SNR of the noise's loss; of the velocity's, whose own weight is SNR + 1, over that (Hang et al. 2023)."""
        alpha = self.schedule.alphas_cumprod.to(times.device)[times].float()
        ratio = alpha / (1 - alpha)
        return ratio.clamp(max=self.snr_gamma) / (ratio + 1 if velocity else ratio)

    def figures(self) -> dict[str, float]:
        """Mean losses since they were asked for last, of all processes."""
        told = {name: average(torch.stack(values).mean()) for name, values in self.seen.items() if values}
        self.seen = {name: [] for name in LOSSES}
        return told

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **others) -> None:
        """As transformers' models have it, which has had two names; every block that diffusers can."""
        settings = activation_checkpointing_kwargs or others.get("gradient_checkpointing_kwargs") or {"use_reentrant": False}
        self.unet.enable_gradient_checkpointing(partial(_checkpointed, **settings))
        for part in text_encoders(self.pipeline) if self.text else ():
            module = self.get_submodule(part)
            if hasattr(module, "activation_checkpointing_enable"):
                module.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
            else:
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    gradient_checkpointing_enable = activation_checkpointing_enable

    def enable_input_require_grads(self) -> None:
        """What enters the first block has to want a gradient: reentrant checkpoints give none to what lies in them else."""
        self.unet.conv_in.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        for part in text_encoders(self.pipeline) if self.text else ():
            self.get_submodule(part).enable_input_require_grads()


def _checkpointed(module, *args, **settings):
    return checkpoint(module.__call__, *args, **settings)
