"""Files that are whole or absent, and readable errors for those that are damaged or missing.

Everything is written beside its final name, synced and renamed; safetensors only, nothing is unpickled. Folders: folders.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError, kind_in_words
from .durable import mode_like, one_line_errors, preparing, staged, sync, sync_folder


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        UserError: `path` is a folder or a device, or cannot be written, with the reason. It is then unchanged.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a {'folder' if path.is_dir() else 'device'}; give the name of a file")
    with preparing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = staged(path.parent, path.name, folder=False)
        temporary = stage.__enter__()
    try:
        with one_line_errors(path):
            yield temporary
            mode_like(temporary, path, 0o666)
            sync(temporary)
        with preparing(path):
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        stage.__exit__(None, None, None)


def write_json(path: Path, value) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Contiguous CPU copies in one safetensors file; the same tensors and metadata are the same bytes."""
    whole = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata={"format": "pt", **(metadata or {})})
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put a file's metadata in order: safetensors writes them as its hash table has them, another way each time."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


MOST_JSON = 2**26
"""Bytes of the largest JSON file that is read; the index of a model of 100,000 tensors has a tenth."""


def read_json(path: Path, what: str) -> dict:
    """A JSON object.

    Raises:
        UserError: the file is missing, too large, is not JSON, names a field twice, or holds something else than an object.
    """
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise UserError(f"{path} has {size:,} bytes, expected at most {MOST_JSON:,} of settings; {what}")
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {what}") from None
    except (ValueError, RecursionError) as error:  # also half a letter, a number of 5000 digits, 10,000 brackets
        raise UserError(f"{path} is not valid JSON ({error}); {what}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {what}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {kind_in_words(value)}, expected a JSON object; {what}")
    return value


def parse_json(text: str):
    """The value of a JSON document in which no field stands twice.

    Raises:
        ValueError, RecursionError: malformed, a field that stands twice, deeper or larger numbers than Python reads.
    """
    return json.loads(text, object_pairs_hook=_fields)


def _fields(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice[:80]!r} stands twice")
    return fields


def shard_files(index: Path) -> dict[str, str]:
    """Tensor → the file that holds it, by a checkpoint's index: a name below the index's own folder.

    Raises:
        UserError: no such mapping, or a file outside of the folder.
    """
    shards = read_json(index, "it lists the shards").get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and name for name in shards.values()):
        raise UserError(f"{index}: weight_map names no file for each tensor; save the model again")
    for name in set(shards.values()):
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name or not name.isprintable():
            raise UserError(f"{index} names a file outside of its folder: {name[:200]!r}; do not load it")
    return shards


def refuse_unreadable(path: Path) -> None:
    """Raise UserError where a file may not be read: safetensors itself would say that it is not there."""
    try:
        with open(path, "rb"):
            return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that you may read") from None


@contextlib.contextmanager
def open_tensors(path: Path):
    """`safe_open` with readable errors; tensors are read one at a time."""
    if not path.is_file():
        raise UserError(f"{path} is missing; expected a safetensors file there")
    refuse_unreadable(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); copy or download it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
