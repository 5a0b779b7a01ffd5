"""Names and shapes in the files that a loaded model came from: what its config's `_name_or_path` points to, on this machine.

A folder, or a model of the hub that lies in its cache; nothing is downloaded and no weight is read. Only safetensors say what they
hold without being unpickled.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..errors import UserError
from .files import open_tensors, shard_files
from .models import WHEEL_MODEL, cache_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Header:
    """Which tensors a checkpoint holds; shapes are read on demand."""

    def __init__(self, files: dict[str, Path]):
        self.files = files  # tensor → its file

    def shape(self, key: str) -> tuple[int, ...]:
        with open_tensors(self.files[key]) as file:
            return tuple(file.get_slice(key).get_shape())


class Keys:
    """Under which keys a checkpoint holds a model's parameters: their names, those without or with the base model's prefix (models
    without a head save without the others'), or older names that transformers knows."""

    def __init__(self, model, keys):
        self.model, self.keys, self.prefix = model, set(keys), getattr(model, "base_model_prefix", "") or ""
        self._renamed: tuple[dict[str, str], bool] | None = None

    def find(self, name: str) -> str | None:
        same = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}") if self.prefix else (name,)
        return next((key for key in same if key in self.keys), None) or self.renamed.get(name)

    @property
    def renamed(self) -> dict[str, str]:
        """Name in the model → the key that transformers renames to it; not where it converts the numbers too."""
        return self._conversion()[0]

    @property
    def converts(self) -> bool:
        """Does transformers make parameters of this model out of others in the checkpoint (experts that are stored one by one)?"""
        return self._conversion()[1]

    def _conversion(self) -> tuple[dict[str, str], bool]:
        if self._renamed is None:
            self._renamed = _renamed(self.model, self.keys, self.prefix)
        return self._renamed


def _renamed(model, keys: set[str], prefix: str) -> tuple[dict[str, str], bool]:
    if not hasattr(model, "_adjust_missing_and_unexpected_keys"):  # not loaded by transformers
        return {}, False
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
    except ImportError:  # a version that renames nothing
        return {}, False
    mapping, state = get_model_conversion_mapping(model), _tensors(model)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    names, converts = {}, False
    for key in sorted(keys, key=dot_natural_key):
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if converted is None and name in state:
            names.setdefault(name, key)
        converts |= converted is not None
    return names, converts


def _tensors(model) -> dict:
    """Parameters and buffers by name. `state_dict` would ask each module to write itself: bitsandbytes' 4-bit layer unpacks what an
    evaluation on a CPU has packed, and leaves the scales of its blocks in another order."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def header_of(config) -> Header | None:
    """The header of the checkpoint that a transformers config came with; None where it is not found here."""
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    with contextlib.suppress(UserError, OSError, ValueError):
        if (index := _file(name, INDEX, config)) is not None:
            shards = shard_files(index)
            folders = {shard: _file(name, shard, config) for shard in set(shards.values())}
            return Header({key: folders[shard] for key, shard in shards.items()}) if all(folders.values()) else None
        if (single := _file(name, SINGLE, config)) is not None:
            with open_tensors(single) as file:
                return Header(dict.fromkeys(file.keys(), single))
    return None


def _file(name: str, file: str, config) -> Path | None:
    """Where a file of a model lies on this machine, or None."""
    folder = cache_folder() / "models" / WHEEL_MODEL if name.lower() == WHEEL_MODEL else Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    if folder.is_absolute() or name.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):
        path = try_to_load_from_cache(name, file, revision=getattr(config, "_commit_hash", None))
        return Path(path) if isinstance(path, str) else None
    return None
