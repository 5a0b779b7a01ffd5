"""A thing from a few images, under a prompt with a rare word (DreamBooth), in a text-to-image pipeline of diffusers.

`data` is a folder of images, `model` a pipeline: adapters on its UNet, on its text encoders too where `text_encoders` says so, all
else frozen. Latents and prompts are encoded once before the run. The loss is `denoising.py`'s; instance and prior loss stand
beside it in the log. Cost: decoding and encoding each image once; with class images, twice the images a step.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ...adapter.targets import name_matches
from ...config import METHODS, AdapterConfig
from ...errors import UserError
from ...layers.layouts import named_layers
from ...support.devices import device_of
from ...support.fields import setting_names
from ...support.patterns import excluding
from ...support.pipelines import TEXT_ENCODERS, latent_side, load_pipeline, takes_sizes
from ...support.processes import agree
from ..dreambooth import DreamBoothSettings, check_prompts, doubtful_prompts, images_in, instance_images, prompts_of
from . import Objective

NOT_YET = {"quantize": "none", "fsdp": "none"}
"""Settings that a pipeline is not trained with, and what they have to be."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The attention of CLIP's text encoders."""


class DreamBooth(Objective):
    """One thing, and the class that it is of."""

    unit = "images"
    reads = (*setting_names(DreamBoothSettings), "sample_prompts", "sample_steps")

    def check(self) -> None:
        recipe = self.recipe
        for name, idle in NOT_YET.items():
            if (value := getattr(recipe, name)) != idle:
                raise UserError(f"{name} is {value!r}, which objective dreambooth cannot; set {name}: {idle}")
        if recipe.method not in METHODS:
            raise UserError(f"method {recipe.method} is not for pipelines; objective dreambooth takes one of {', '.join(METHODS)}")
        if recipe.data and not isinstance(recipe.data, str):
            raise UserError(f"data is {recipe.data}; objective dreambooth takes one folder of images")
        check_prompts(recipe)
        if recipe.class_images and os.path.realpath(recipe.class_images) == os.path.realpath(recipe.data or "."):
            raise UserError(f"class_images is {recipe.class_images!r}, the folder of data; give the class a folder of its own")

    def processor(self):
        """The pipeline; its images and prompts are looked at first, which takes less time."""
        recipe = self.recipe
        self.unusable: list[str] | None = [] if recipe.bad_items == "skip" else None
        self.notes: list[str] = []
        self.instance = instance_images(recipe.data, self.notes.append, self.unusable)
        self.prompts = prompts_of(self.instance, recipe)
        if recipe.class_images:
            self._class_images(self.notes.append, self.unusable)
        self.pipeline = load_pipeline(recipe.model, recipe.dtype)
        latent_side(self.pipeline, recipe.resolution, recipe.model)
        return self.pipeline

    def examples(self, processor, say, counts):
        from ..latents import LatentPairs
        from ..painting import fill_class

        recipe = self.recipe
        for note in self.notes:
            say(note)
        for line in doubtful_prompts(recipe, self.prompts, recipe.sample_prompts):
            say(f"warning: {line}")
        processor.to(device_of(recipe.device))
        prior = []
        if recipe.class_images:
            count = len(self._class_images(lambda line: None, self._apart()))
            agree(lambda: fill_class(Path(recipe.class_images), count, processor, recipe, say))
            prior = self._class_images(lambda line: None, self._apart())
        counts["training"] = {"instance": len(self.instance), "class": len(prior), "unusable": len(self.unusable or ())}
        beside = f", {len(prior)} images of {recipe.class_prompt!r}" if prior else ", no images of its class"
        skipped = f"; {len(self.unusable)} unusable images skipped (the first: {self.unusable[0]})" if self.unusable else ""
        own = f"{len(set(self.prompts))} prompts" if recipe.caption_column else repr(recipe.instance_prompt)
        say(f"{recipe.data}: {len(self.instance)} images of {own}{beside}{skipped}")
        small = sum(min(item.open().size) < recipe.resolution for item in self.instance)
        if small:
            say(f"{small} of {len(self.instance)} images are smaller than {recipe.resolution} pixels, and enlarged")
        classes = [recipe.class_prompt] * len(prior)
        self.pairs = LatentPairs(self._rows(self.instance, self.prompts), self._rows(prior, classes))
        return self.pairs, []

    def _apart(self) -> list[str] | None:
        """For lines about broken images that were said already; None where the first one stops."""
        return None if self.unusable is None else []

    def leave(self, processor, folder: Path) -> None:
        """Nothing: the base's tokenizers read its prompts."""

    def _class_images(self, say, unusable: list[str] | None) -> list:
        """Those that are there; none where the folder is empty or not there yet."""
        folder = Path(self.recipe.class_images)
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return []
        return images_in(str(folder), "class_images", say, unusable)

    def _rows(self, items, prompts: list[str]) -> list[dict]:
        from ..latents import latent_rows

        return latent_rows(items, prompts, self.pipeline.vae, self.recipe.resolution)

    def load(self, dtype: str, quantize: str = "none", double_quantization: bool = False):
        from ..denoising import Denoiser

        recipe, text = self.recipe, self.recipe.text_encoders == "adapted"
        self.denoiser = Denoiser(self.pipeline, text, self.noise, recipe.prior_weight, recipe.snr_gamma)
        if not text:
            self.denoiser.encode(dict.fromkeys([*self.prompts, *([recipe.class_prompt] if recipe.class_prompt else [])]))
        return self.denoiser

    def adapter(self, model) -> AdapterConfig:
        """With the text encoders' attention, where they are adapted and no target is in them."""
        config = self.recipe.adapter()
        if self.recipe.text_encoders == "frozen":
            return config
        names = [name for name, _ in named_layers(model) if name.startswith(tuple(f"{part}." for part in TEXT_ENCODERS))]
        if isinstance(config.targets, tuple) and not any(name_matches(config.targets, name) for name in names):
            config = replace(config, targets=(*config.targets, *TEXT_TARGETS))
        if takes_sizes(self.pipeline):  # it reads the last state but one of the first encoder
            last = self.pipeline.text_encoder.config.num_hidden_layers - 1
            unread = [name for name in names if name.startswith("text_encoder.") and f".layers.{last}." in name]
            config = replace(config, exclude=excluding(config.exclude, unread))
        return config

    def example(self, model) -> dict:
        from ..latents import latent_batch

        batch = latent_batch([self.pairs[0]])
        return {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}

    def collator(self, model, processor):
        from ..latents import latent_batch

        return latent_batch

    def arguments(self) -> dict:
        return {"train_sampling_strategy": "random", "label_names": []}

    def watchers(self, processor, say, checkpoint) -> list:
        from ..denoising import StepNoise
        from ..painting import ImageSamples

        self.noise = StepNoise(self.recipe.seed)
        return [self.noise, *([ImageSamples(self.recipe, say, checkpoint)] if self.recipe.sample_prompts else [])]

    def units_in(self, inputs) -> int:
        return len(inputs["prompts"])

    def figures(self) -> dict[str, float]:
        return self.denoiser.figures()

    def save(self, model, folder: Path) -> list[str]:
        from ...checkpoint.pipelines import save_pipeline_adapter

        return save_pipeline_adapter(model, folder, self.recipe.model)


OBJECTIVE = DreamBooth
