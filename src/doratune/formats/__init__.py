"""Adapter files of other programs, one file a format: how each is recognized, read and written, and what it cannot say.

A format reads into `NeutralAdapter` (module → factors, scaling, magnitude with its axis) and writes from one; nothing else in the
package knows its names. Files in this folder that hold `FORMATS` are found by themselves: a new format is one new file. PEFT's own
layout, which adapters are saved in here, is `checkpoint/`. Sources are named in each file; reading costs the file's tensors once.

    neutral.py      an adapter without a format, and as an AdapterConfig
    source.py       the tensors and settings of a file or folder
    names.py        module names: prefixes of pipelines, names with underscores, of a model
    spellings.py    other spellings of a model's own names: the original Stable Diffusion's, CLIP's
    magnitudes.py   which axis a magnitude has
    factors.py      factors in other forms: LoHa, LoKr, Tucker as A and B; one rank for all
    pairs.py        what formats share that hold A, B and m of linear layers
    kohya.py        kohya and LyCORIS: lora_unet_…, dora_scale, LoHa, LoKr
    aitoolkit.py    ai-toolkit: lora_A, lora_B, magnitude
    torchtune.py    torchtune: layers.N.attn.q_proj.lora_a.weight
    mlx.py          mlx-lm: adapters.safetensors with lora_a (I, R), m
    authors.py      the paper's own code: weight_m_wdecomp
    diffusers.py    pytorch_lora_weights.safetensors
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, listed, near_misses, with_article
from .source import Source, source_of

if TYPE_CHECKING:
    from torch import Tensor

    from .names import ModelNames
    from .neutral import NeutralAdapter

Parts = dict[str, dict[str, "Tensor"]]
"""Module, as the file spells it → part → tensor."""


@dataclass(frozen=True)
class Stated:
    """What a file may leave open and a caller knows."""

    model: ModelNames | None = None
    component: str | None = None
    """unet, transformer, text_encoder …: the part of a pipeline that is meant."""
    magnitude_axis: str | None = None
    alpha: float | None = None

    def __post_init__(self):
        if self.magnitude_axis not in (None, "output", "input"):
            raise UserError(f"magnitude_axis is {self.magnitude_axis!r}; expected output or input")
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha is not None and not (number and 0 < self.alpha < float("inf")):
            raise UserError(f"alpha is {self.alpha!r}; expected a positive number")


@dataclass
class Written:
    """What a format writes: the tensors of one safetensors file with its metadata, and JSON files beside it."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


class Format:
    """Subclasses declare and override; instances have no state."""

    name: str
    title: str
    parts: tuple[str, ...]
    """Endings of its tensors' names after the module, without the dot."""
    file: str
    """Name of its tensors' file in a folder."""
    in_folder = False
    """Does it need settings beside its tensors, so that a single file is not enough?"""

    def split(self, key: str) -> tuple[str, str] | None:
        """(module, part) of a tensor's name, or None: not of this format."""
        match = re.fullmatch(rf"(.+)\.({'|'.join(map(re.escape, sorted(self.parts, key=len, reverse=True)))})", key)
        return (match[1], match[2]) if match else None

    def endings(self, source: Source) -> set[str]:
        """Those of its parts that the file has."""
        return {split[1] for key in source.tensors if (split := self.split(key))}

    @abstractmethod
    def recognizes(self, source: Source) -> bool:
        """Is this a file of the format? Asked of all formats, of which exactly one must say yes."""

    @abstractmethod
    def read(self, source: Source, stated: Stated) -> NeutralAdapter:
        """The adapter.

        Raises:
            UserError: missing or further tensors, an axis or a factor that the file leaves open.
        """

    @abstractmethod
    def cannot_say(self, adapter: NeutralAdapter, stated: Stated) -> str | None:
        """Why the format has no words for this adapter, or None."""

    @abstractmethod
    def write(self, adapter: NeutralAdapter, stated: Stated) -> Written:
        """Its tensors and settings, of an adapter that it can say."""

    def parted(self, source: Source) -> Parts:
        """The tensors by module and part; every other tensor of the file is an error that lists them all."""
        parts: Parts = {}
        extra = []
        for key, tensor in source.tensors.items():
            split = self.split(key)
            if split is None:
                extra.append(key)
            elif split[1] in parts.setdefault(split[0], {}):
                extra.append(f"{key} (twice)")
            else:
                parts[split[0]][split[1]] = tensor
        if extra:
            raise UserError(
                f"{source.path} is {with_article(self.title)} file with tensors that this format has not: {listed(extra, 24)}; "
                f"it holds {source.holding()}"
            )
        return parts


@cache
def _built_in() -> tuple[Format, ...]:
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    return tuple(one for module in modules for one in getattr(module, "FORMATS", ()))


def format_names() -> tuple[str, ...]:
    return tuple(one.name for one in _built_in())


def format_named(name: str) -> Format:
    """Raises UserError for an unknown name, with near misses."""
    for one in _built_in():
        if one.name == name:
            return one
    raise UserError(f"no format {name!r}; there are {', '.join(format_names())}{near_misses(name, format_names())}")


def recognized(path: Path) -> tuple[Format, Source] | None:
    """The format of a file or folder, with what it holds; None: a folder that is PEFT's or none of these.

    Raises:
        UserError: a file of no format or of several, a pickle that holds more than tensors.
    """
    source = source_of(path)
    if source is None:
        return None
    formats = [one for one in _built_in() if one.recognizes(source)]
    if len(formats) == 1:
        return formats[0], source
    if formats:
        titles = ", ".join(one.title for one in formats)
        raise UserError(f"{path} mixes the formats {titles}; it holds {source.holding()}: give files of one format")
    titles = ", ".join(one.name for one in _built_in())
    raise UserError(f"{path} is of no format that is known ({titles}, or an adapter folder); it holds {source.holding()}")
