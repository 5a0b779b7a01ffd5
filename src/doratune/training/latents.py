"""Images as a denoiser reads them: mean and deviation of their latents, encoded once before the run, in pairs of thing and class.

An image's shorter side is brought to the resolution, and its middle is taken; there is no flip. SDXL is told the file's own height
and width, where the crop began, and the resolution. Cost: the VAE's encoder once an image, in fp32; the latents in memory (0.5 MB
an image of 1024 pixels).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.image_sets import LabelledImage


@torch.no_grad()
def latent_rows(items: Sequence[LabelledImage], prompts: Sequence[str], vae, resolution: int) -> list[dict]:
    """{mean, deviation (C, h, w), sizes (6,), prompt} of each image, on the CPU.

    Raises:
        UserError: an image that cannot be read.
    """
    rows = []
    for item, prompt in zip(items, prompts, strict=True):
        pixels, sizes = prepared(item.open(), resolution)
        latent = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
        parts = {"mean": latent.mean[0].float().cpu(), "deviation": latent.std[0].float().cpu()}
        rows.append(parts | {"sizes": torch.tensor(sizes, dtype=torch.float32), "prompt": prompt})
    return rows


def prepared(image, resolution: int) -> tuple[Tensor, tuple[int, ...]]:
    """(pixels (3, R, R) from −1 to 1, (height, width, top, left, R, R)) of an RGB image."""
    import numpy as np
    from PIL import Image

    width, height = image.size
    scale = resolution / min(width, height)
    size = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    image = image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, (height, width, top, left, resolution, resolution)


class LatentPairs(Dataset):
    """(row of the thing, row of the class or None); as many as the longer of both has, the shorter is gone through again."""

    def __init__(self, instance: Sequence[dict], prior: Sequence[dict]):
        self.instance, self.prior = list(instance), list(prior)

    def __len__(self) -> int:
        return max(len(self.instance), len(self.prior))

    def __getitem__(self, index: int) -> tuple[dict, dict | None]:
        prior = self.prior[index % len(self.prior)] if self.prior else None
        return self.instance[index % len(self.instance)], prior


def latent_batch(pairs: Sequence[tuple[dict, dict | None]]) -> dict:
    """What `Denoiser.forward` takes: the things of the pairs, then their classes."""
    rows = [instance for instance, _ in pairs] + [prior for _, prior in pairs if prior is not None]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in ("mean", "deviation", "sizes")}
    return stacked | {"prompts": [row["prompt"] for row in rows], "instances": len(pairs)}
