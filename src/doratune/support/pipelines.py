"""Text-to-image pipelines of diffusers whose network is a UNet over a VAE's latents: Stable Diffusion 1, 2 and XL.

    model_index.json                             the pipeline's class, and the class of each part
    unet, vae, scheduler                         what denoises, what pixels are to it, how noise is added
    text_encoder (and _2), tokenizer (and _2)    what a prompt is to it; two in SDXL

What a pipeline can be trained on is asked of its parts, not of its name: a UNet that takes the VAE's latents, a scheduler with a
table of noise whose target is the noise or the velocity. Source: diffusers. Cost: loading; the VAE in fp32, because SDXL's
overflows in fp16.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError, with_article
from .files import read_json
from .hub import hub_settings
from .models import quiet_loading, readable_errors, torch_dtype

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

INDEX = "model_index.json"
ADAPTER_RECORD = "pipeline.json"
"""In the folder of a pipeline's adapter: its base, and the parts that have one."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
PREDICTIONS = ("epsilon", "v_prediction")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that are used by no training and no sample."""


def is_pipeline(folder: str | Path) -> bool:
    """Is it the folder of a pipeline?"""
    return (Path(folder) / INDEX).is_file()


def is_pipeline_adapter(folder: str | Path) -> bool:
    """Is it the folder of a pipeline's adapter?"""
    return (Path(folder) / ADAPTER_RECORD).is_file()


def load_pipeline(name: str, dtype: str = "float32") -> DiffusionPipeline:
    """The pipeline `name`, a folder or a hub id; every part frozen and in evaluation mode.

    Raises:
        UserError: it cannot be found or read, or has no UNet that is trained here, with the reason.
    """
    settings = pipeline_source(name)
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise UserError(f"{name} is trained by diffusers; run: pip install 'doratune[images]'") from None
    with quiet_loading(), quiet_diffusers(), readable_errors(name):
        index = checked_index(name, settings)
        without = {part: None for part in _UNUSED if isinstance(index.get(part), list) and index[part][0]}
        dtypes = {"default": torch_dtype(dtype), "vae": torch.float32}
        pipeline = DiffusionPipeline.from_pretrained(name, torch_dtype=dtypes, **without, **settings)
    refuse_unfit(pipeline, name)
    pipeline.set_progress_bar_config(disable=True)
    for part, module in networks(pipeline).items():
        module.requires_grad_(False).eval()
        _rename(module, f"{name.rstrip('/')}/{part}")
    return pipeline


def checked_index(name: str, settings: dict[str, Any]) -> dict:
    """The pipeline's model_index.json.

    Raises:
        UserError: it has no UNet and VAE.
    """
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(name, **settings)
    if "unet" not in index or not {"vae", "text_encoder", "tokenizer", "scheduler"} <= index.keys():
        kind = index.get("_class_name", "pipeline")
        raise UserError(f"{name} is {with_article(kind)} without a UNet and a VAE; give a Stable Diffusion 1.x, 2.x or XL")
    return index


def networks(pipeline) -> dict[str, torch.nn.Module]:
    """The networks of a pipeline by the names of their parts."""
    return {part: module for part, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}


def text_encoders(pipeline) -> dict[str, torch.nn.Module]:
    return {part: module for part, module in networks(pipeline).items() if part in TEXT_ENCODERS}


def latent_scale(pipeline) -> int:
    """Pixels a side that are one of the latent's."""
    return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


def latent_side(pipeline, resolution: int, name: str) -> int:
    """Side of the latent of an image of so many pixels a side.

    Raises:
        UserError: the VAE cannot divide them.
    """
    scale = latent_scale(pipeline)
    if resolution % scale:
        sizes = [size for size in (resolution // scale * scale, -(-resolution // scale) * scale) if size]
        raise UserError(
            f"resolution is {resolution}, which the VAE of {name} cannot divide by {scale}; give {' or '.join(map(str, sizes))}"
        )
    return resolution // scale


def takes_sizes(pipeline) -> bool:
    """Is its UNet conditioned on the pooled text and on the image's sizes (SDXL)?"""
    return pipeline.unet.config.addition_embed_type == "text_time"


def noise_schedule(pipeline):
    """The table of noise that the pipeline was trained with, as diffusers' DDPM has it."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipeline.scheduler.config)


def pipeline_source(name: str) -> dict[str, Any]:
    """`from_pretrained`'s settings for where the files come from.

    Raises:
        UserError: a folder that holds no pipeline; no such folder.
    """
    path = Path(name)
    if path.is_dir():
        if is_pipeline(path):
            read_json(path / INDEX, "a pipeline of diffusers needs it")
            return {}
        inner = "a model of transformers or a part of a pipeline" if (path / "config.json").is_file() else "no model"
        raise UserError(f"{name} holds {inner}, no pipeline of diffusers ({INDEX}); give the folder of a whole one, or a hub id")
    if path.exists():
        raise UserError(f"{name} is a file; give the folder of a pipeline of diffusers ({INDEX}), or a hub id")
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"{name}: no such folder; give the folder of a pipeline of diffusers ({INDEX}), or a hub id")
    return hub_settings(name)


def refuse_unfit(pipeline, name: str) -> None:
    """Raise where latents, noise and UNet are not what the loss is of."""
    unet, vae, noise = pipeline.unet.config, pipeline.vae.config, pipeline.scheduler.config
    if unet.in_channels != vae.latent_channels:
        raise UserError(
            f"{name}: its UNet takes {unet.in_channels} channels and its VAE has {vae.latent_channels}: one for inpainting or "
            "editing, which is not trained here; give a text-to-image pipeline"
        )
    if unet.addition_embed_type not in (None, "text_time"):
        raise UserError(f"{name}: its UNet wants {unet.addition_embed_type}, which nothing here tells it; give SD 1.x, 2.x or SDXL")
    prediction = noise.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or "beta_schedule" not in noise or getattr(vae, "latents_mean", None) is not None:
        raise UserError(
            f"{name}: its scheduler ({type(pipeline.scheduler).__name__}, prediction_type {prediction}) has another loss than "
            f"{' or '.join(PREDICTIONS)} over a table of noise; give a pipeline with one of them"
        )


def _rename(module, name: str) -> None:
    """The name that was asked for, not a folder of this machine's cache."""
    if hasattr(module, "register_to_config"):
        module.register_to_config(_name_or_path=name)
    else:
        module.config._name_or_path = name


@contextlib.contextmanager
def quiet_diffusers():
    """Without its bar, its notes on parts that are left out, and its wish for `dtype`, which older versions do not know."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
