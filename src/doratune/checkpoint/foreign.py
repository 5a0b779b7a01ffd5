"""Files of other programs as an adapter folder is read: (config, PEFT's fields, tensors). The formats are `formats/`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ..config import AdapterConfig
from ..formats import Stated, recognized
from ..formats.names import ModelNames
from ..formats.neutral import NeutralAdapter
from . import peft

Triple = tuple[AdapterConfig, dict, dict[tuple[str, str], Tensor]]


def read_neutral(path: Path, stated: Stated) -> tuple[NeutralAdapter, str] | None:
    """(the adapter, its format's name) of another program's file or folder; None: a folder that is PEFT's or ours, or no adapter.

    Raises:
        UserError: no format or several, tensors that are missing or too many, an axis or alpha that the file leaves open.
    """
    if (known := recognized(path)) is None:
        return None
    one, source = known
    return one.read(source, stated), one.name


def read_foreign(path: Path, model: nn.Module | None = None, magnitude_axis: str | None = None, alpha=None) -> Triple | None:
    """What `read_folder` returns, of another program's file or folder; None as `read_neutral`."""
    stated = Stated(None if model is None else ModelNames.of(model), None, magnitude_axis, alpha)
    foreign = read_neutral(path, stated)
    return None if foreign is None else as_folder(foreign[0])


def as_folder(adapter: NeutralAdapter) -> Triple:
    """The adapter as a folder of our type says it."""
    config = adapter.config()
    described = peft.describe(config, adapter.ranks(), adapter.alphas(), adapter.base_model, own=True)
    return config, described, adapter.tensors()
