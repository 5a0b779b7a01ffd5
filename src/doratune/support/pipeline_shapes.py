"""A text-to-image pipeline of diffusers without its weights: the configs of its parts, and the parts on the meta device.

    model_index.json             the classes of the parts
    unet, vae, scheduler, …      config.json or scheduler_config.json of each, from a folder or the hub

What `pipelines.py` asks of a loaded pipeline can be asked of these parts too. Source: diffusers. Cost: reading small files;
building modules without memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import UserError
from .models import quiet_loading, readable_errors
from .pipelines import TEXT_ENCODERS, checked_index, pipeline_source, quiet_diffusers, refuse_unfit


@dataclass
class PipelineConfigs:
    """Of the parts that are trained or told what to do."""

    name: str
    unet: dict
    vae: dict
    scheduler: dict
    encoders: dict[str, tuple[str, Any]]
    """{text_encoder …: (its class in transformers, its config)}."""


def pipeline_configs(name: str) -> PipelineConfigs:
    """Of a folder or a hub id.

    Raises:
        UserError: it is no pipeline with a UNet and a VAE, or a part has no config.
    """
    settings = pipeline_source(name)
    try:
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    except ImportError:
        raise UserError(f"{name} is trained by diffusers; run: pip install 'doratune[images]'") from None
    from transformers import AutoConfig

    def read(part: str, load) -> Any:
        with readable_errors(f"{name}/{part}"):
            return load(name, subfolder=part, **settings)

    loads = {"unet": UNet2DConditionModel.load_config, "vae": AutoencoderKL.load_config, "scheduler": DDPMScheduler.load_config}
    with quiet_loading(), quiet_diffusers():
        with readable_errors(name):
            index = checked_index(name, settings)
        parts = {part: read(part, load) for part, load in loads.items()}
        own = [part for part in TEXT_ENCODERS if isinstance(index.get(part), list) and index[part][0]]
        encoders = {part: (index[part][1], read(part, AutoConfig.from_pretrained)) for part in own}
    return PipelineConfigs(name, **parts, encoders=encoders)


def pipeline_skeleton(configs: PipelineConfigs, dtype: torch.dtype) -> SimpleNamespace:
    """The pipeline's networks and its scheduler by the names of the parts; all of them also in `components`.

    Args:
        dtype: of the networks, but for the VAE's fp32.

    Raises:
        UserError: a pipeline that is not trained here, with the reason.
    """
    import transformers
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    with quiet_loading(), quiet_diffusers(), readable_errors(configs.name), torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel.from_config(configs.unet).to(dtype),
            "vae": AutoencoderKL.from_config(configs.vae).float(),
        }
        for part, (cls, config) in configs.encoders.items():
            networks[part] = getattr(transformers, cls)._from_config(config, dtype=dtype)
    parts = {part: module.requires_grad_(False).eval() for part, module in networks.items()}
    skeleton = SimpleNamespace(**parts, scheduler=DDPMScheduler.from_config(configs.scheduler), components=parts)
    refuse_unfit(skeleton, configs.name)
    return skeleton
