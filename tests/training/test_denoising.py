"""The loss of a pipeline against its formula in float64: noise and velocity, min-SNR weights, prior weight, SDXL's conditions."""

import pytest
import torch
from pipelines import pipeline_folder

from doratune.support.pipelines import load_pipeline
from doratune.training.denoising import Denoiser, StepNoise

pytest.importorskip("diffusers")
PROMPTS = ["a photo of sks dog", "a photo of dog", "a photo of sks dog"]


def batch():
    draw = torch.Generator().manual_seed(3)
    mean, deviation = torch.randn(3, 4, 8, 8, generator=draw), torch.rand(3, 4, 8, 8, generator=draw)
    sizes = torch.tensor([[20.0, 24, 0, 2, 16, 16]] * 3)
    return {"mean": mean, "deviation": deviation, "prompts": PROMPTS, "sizes": sizes}


def expected(pipeline, given, generator, gamma):
    """(N,) of the formula, with the UNet's own answer and diffusers' own encoding of prompts."""
    config = pipeline.scheduler.config
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64) ** 2
    times = torch.randint(1000, (3,), generator=generator)
    draw, noise = (torch.randn(3, 4, 8, 8, generator=generator).double() for _ in range(2))
    alpha = (1 - betas).cumprod(0)[times].view(-1, 1, 1, 1)
    z = (given["mean"] + given["deviation"] * draw) * pipeline.vae.config.scaling_factor
    noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
    velocity = config.prediction_type == "v_prediction"
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * z if velocity else noise
    with torch.no_grad():
        text = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        more = {"text_embeds": text[2], "time_ids": given["sizes"]} if len(text) == 4 else {}
        said = pipeline.unet(noisy.float(), times, text[0], added_cond_kwargs=more).sample.double()
    error = (said - target).square().mean((1, 2, 3))
    ratio = (alpha / (1 - alpha)).flatten()
    weight = ratio.clamp(max=gamma) / (ratio + velocity) if gamma else 1
    return error * weight


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize(("kind", "prediction"), [("sd", "epsilon"), ("sd", "v_prediction"), ("sdxl", "epsilon")])
def test_the_loss_is_the_formula(kind, prediction, gamma, tmp_path):
    pipeline = load_pipeline(str(pipeline_folder(tmp_path / "base", kind, prediction)))
    given, noise = batch(), StepNoise(7)
    denoiser = Denoiser(pipeline, False, noise, prior_weight=0.5, snr_gamma=gamma).eval()
    each = expected(pipeline, given, torch.Generator().manual_seed(7), gamma)
    with torch.no_grad():
        losses = denoiser(**given, instances=2)
    torch.testing.assert_close(losses["instance_loss"].double(), each[:2].mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["prior_loss"].double(), each[2:].mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss"].double(), each[:2].mean() + 0.5 * each[2:].mean(), rtol=1e-4, atol=1e-6)
    denoiser.encode(PROMPTS)  # what is held is what is computed
    with torch.no_grad():
        assert denoiser(**given, instances=3)["loss"] == denoiser(**given, instances=3)["instance_loss"]


def test_the_noise_of_a_step_is_its_own(monkeypatch):
    """By run, step, batch and process; the same when it is asked for again."""
    seen = set()
    for seed, step, rank in ((0, 0, "0"), (0, 1, "0"), (1, 0, "0"), (0, 0, "1")):
        monkeypatch.setenv("RANK", rank)
        noise = StepNoise(seed)
        noise.step = step
        first, second = (torch.randn(8, generator=noise.generator()) for _ in range(2))
        noise.batch = 0
        assert torch.equal(first, torch.randn(8, generator=noise.generator()))
        seen |= {tuple(first.tolist()), tuple(second.tolist())}
    assert len(seen) == 8
