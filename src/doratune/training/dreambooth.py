"""DreamBooth's settings and its images (Ruiz et al. 2023): a few images of one thing under a prompt with a rare word, and images
of its class, which the model is held to while it learns the thing.

    loss = |ε − ε(instance)|² + prior_weight · |ε − ε(class)|²        a step takes as many images of the class as of the thing

Class images that lack are drawn by the pipeline itself, before it is trained, image after image by seed, so that an interrupted
run draws the rest. Cost: opening each image once; drawing images, which are then there.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.files import placed, read_examples
from ..data.image_sets import LabelledImage, usable
from ..data.images import is_image_name
from ..errors import UserError, listed
from ..support.values import number

TABLES = ("metadata.jsonl", "metadata.csv")
"""Captions of the images beside them, as `datasets` reads a folder of images."""
LEAST = 2
"""Images of the thing: one alone is learned with its background."""


@dataclass(frozen=True, kw_only=True)
class DreamBoothSettings:
    """What a run of DreamBooth learns, beside its images (`data`, a folder) and its pipeline (`model`)."""

    instance_prompt: str = ""
    """Of DreamBooth: what all images of `data` are called, with the rare word: a photo of sks dog."""
    caption_column: str = ""
    """Of DreamBooth: a column of `metadata.jsonl` (or .csv) in `data`, with a prompt for each file_name; empty: one for all."""
    instance_token: str = "sks"
    """Of DreamBooth: the rare word; a prompt without it is warned of."""
    class_prompt: str = ""
    """Of DreamBooth's prior preservation: what the images of the class are called: a photo of dog."""
    class_images: str = ""
    """Of DreamBooth's prior preservation: the folder of the class's images; those that lack are drawn there. Empty: none."""
    class_count: int = number(100, least=1)
    """Of DreamBooth's prior preservation: how many images the class should have."""
    prior_weight: float = number(1.0, least=0)
    """Of DreamBooth's prior preservation: weight of its loss."""
    resolution: int = number(512, least=8, most=8192)
    """Of DreamBooth: pixels a side; an image's shorter side is brought to it, and its middle taken."""
    text_encoders: Literal["frozen", "adapted"] = "frozen"
    """Of a text-to-image pipeline: adapters on the UNet alone, or on its text encoders' attention too."""
    snr_gamma: float = number(0.0, least=0)
    """Of a text-to-image pipeline: weight a step's loss by min(SNR, gamma) / SNR (Hang et al. 2023); 0: all steps alike."""
    denoising_steps: int = number(30, least=1, most=1000)
    """Of images that a pipeline makes, samples and class images: steps of its scheduler."""
    guidance: float = number(7.5, least=0, most=100)
    """Of images that a pipeline makes: how far they are driven to the prompt; up to 1: not at all."""


def check_prompts(settings) -> None:
    """Raise for prompts and folders that do not go together, before anything is loaded.

    Args:
        settings: anything with DreamBoothSettings' names.

    Raises:
        UserError: the setting, and what to give.
    """
    if not settings.instance_prompt.strip() and not settings.caption_column:
        raise UserError("instance_prompt is not set; give what the images show, such as 'a photo of sks dog'")
    if settings.class_images and not settings.class_prompt.strip():
        raise UserError(
            f"class_images is {settings.class_images!r}, but class_prompt is not set: prior preservation needs both; give what the "
            "class is called, such as 'a photo of dog'"
        )
    if settings.class_prompt.strip() and not settings.class_images:
        raise UserError(
            f"class_prompt is {settings.class_prompt!r}, but class_images is not set: prior preservation needs both; give a folder "
            "for the class's images, which are drawn there"
        )


def doubtful_prompts(settings, prompts: list[str], samples: list[str]) -> list[str]:
    """Lines of warning about a rare word that is where it should not be, or is not where it should.

    Args:
        prompts: of the images of the thing.
    """
    token, lines = settings.instance_token, []

    def holds(prompt: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(token.strip())}(?!\w)", prompt, re.IGNORECASE) is not None

    if not token.strip():
        return []
    if without := [prompt for prompt in dict.fromkeys(prompts) if not holds(prompt)]:
        what = f"caption_column: {len(without)} prompts, such as" if settings.caption_column else "instance_prompt is"
        lines.append(
            f"{what} {without[0]!r}, without the instance_token {token!r}: the images change what its other words mean; put it in, "
            "or set instance_token to your own"
        )
    if settings.class_prompt and holds(settings.class_prompt):
        lines.append(
            f"class_prompt is {settings.class_prompt!r}, with the instance_token {token!r}: the class is then held to what the "
            "thing should become; leave it out"
        )
    if samples and not any(map(holds, samples)):
        lines.append(f"no prompt of sample_prompts has the instance_token {token!r}: the samples do not show what is learned")
    return lines


def images_in(folder: str, what: str, say, unusable: list[str] | None = None) -> list[LabelledImage]:
    """The images of a folder and the folders in it, in the order of their names, each opened once.

    Args:
        what: the setting that names it. unusable: takes a line for each broken image; None: the first stops.

    Raises:
        UserError: no folder, no image in it, or one that cannot be read, by its path.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{what} is {folder!r}, which is no folder; give the folder of the images")
    names, other = [], 0
    for current, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = [name for name in sorted(files) if is_image_name(name)]
        other += sum(not name.startswith(".") and name not in TABLES for name in files) - len(pictures)
        names += [Path(current) / name for name in pictures]
    if other:
        say(f"{folder}: {other} files are no images by their names, and left out")
    if not names:
        raise UserError(f"{what} is {folder!r}, a folder without images; expected .png, .jpg, .webp …")
    return usable([LabelledImage(str(name), what, name) for name in names], unusable)


def prompts_of(items: list[LabelledImage], settings) -> list[str]:
    """The prompt of each image of the thing: `instance_prompt`, or its own of `caption_column`.

    Raises:
        UserError: no table, no such column in it, or an image that it does not name.
    """
    column, folder = settings.caption_column, Path(settings.data)
    if not column:
        return [settings.instance_prompt] * len(items)
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        raise UserError(f"caption_column is {column!r}, but {folder} has no {' or '.join(TABLES)}; write one, or drop it")
    captions: dict[str, str] = {}
    for row in read_examples(table):
        if not isinstance(row.get("file_name"), str) or not isinstance(row.get(column), str) or not row[column].strip():
            problem = f"{row.where}: expected texts under file_name and {column!r} (caption_column); it has {listed(row)}"
            raise UserError(placed(problem, row))
        captions[os.path.normpath(row["file_name"])] = row[column]
    names = [os.path.relpath(item.source, folder) for item in items]
    if missing := [name for name in names if name not in captions]:
        raise UserError(f"{table} has no caption of {listed(missing, 3)}; add {'it' if len(missing) == 1 else 'them'}")
    return [captions[name] for name in names]


def instance_images(folder: str, say, unusable: list[str] | None = None) -> list[LabelledImage]:
    """`images_in`, of the thing.

    Raises:
        UserError: also for fewer than two.
    """
    items = images_in(folder, "data", say, unusable)
    if len(items) < LEAST:
        bad = f" ({unusable[0]})" if unusable else ""
        raise UserError(f"data is {folder!r}, with {len(items)} image that can be used{bad}; DreamBooth needs {LEAST} or more")
    return items
