"""Files that are whole or absent, and readable errors for those that are damaged or missing.

Everything is written beside its final name, synced and renamed; safetensors only, nothing is unpickled. Folders: folders.py.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
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


def read_json(path: Path, what: str) -> dict:
    """A JSON object.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {what}") from None
    except (ValueError, RecursionError) as error:  # also half a letter, a number of 5000 digits, 10,000 brackets
        raise UserError(f"{path} is not valid JSON ({error}); {what}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {what}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object; {what}")
    return value


@contextlib.contextmanager
def open_tensors(path: Path):
    """`safe_open` with readable errors; tensors are read one at a time."""
    if not path.is_file():
        raise UserError(f"{path} is missing; expected a safetensors file there")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); copy or download it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
