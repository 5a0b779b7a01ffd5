"""Files that hold examples, one file a container: how each is read item by item, with the line of each.

A container yields (line, value) in order, without holding more of the file than it must; its errors name the file and the line. A
line that is wrong by itself is yielded as the error that it is, so that it can be skipped and counted.
Files in this folder that hold `CONTAINERS` are found by themselves. Around a container there may be a compression: x.jsonl.gz.

    compressed.py   gzip, zstandard, bzip2 and xz around any of them
    json_text.py    .json (one list, or an object a line) and .jsonl
    separated.py    .csv and .tsv with a header
    arrow.py        .parquet and .arrow
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UserError, near_misses
from ...support.absent import no_file
from .compressed import COMPRESSIONS, opened

LINE_BYTES = 1 << 26
"""The longest line that is read: what is longer is no example of text, but a file without line ends."""


@dataclass(frozen=True)
class Container:
    """A kind of file.

    Attributes:
        suffixes: how its names end, with the dot.
        read: (path, binary stream) → (line, value) of each item; raises UserError.
        piecewise: can it be read without holding all of it?
    """

    suffixes: tuple[str, ...]
    read: Callable[[Path, BinaryIO], Iterator[tuple[int, Any]]]
    piecewise: bool = True


@cache
def _built_in() -> dict[str, Container]:
    modules = [importlib.import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    return dict(sorted((suffix, one) for module in modules for one in getattr(module, "CONTAINERS", ()) for suffix in one.suffixes))


def suffixes() -> tuple[str, ...]:
    """Every ending that is read: .json, .jsonl, …, without compressions."""
    return tuple(_built_in())


def container_of(path: Path) -> Container | None:
    """The container that a file's name says, whatever compresses it; None for a name that says none."""
    name = path.name.lower()
    inner = next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), name)
    return _built_in().get(Path(inner).suffix)


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each item of a file; a name that says no container is read as JSON.

    Raises:
        UserError: no such file, no permission, a broken archive, or what the container refuses.
    """
    if not path.is_file():
        raise UserError(f"{path}: {no_file(path, 'data file')}")
    container = container_of(path) or _built_in()[".json"]
    with opened(path) as stream:
        yield from container.read(path, stream)


def known_ending(path: Path) -> str:
    """What to say of a name whose ending no container has."""
    near = near_misses(path.suffix, _built_in()) if path.suffix else ""
    return f"expected {', '.join(_built_in())}, or one of them in {', '.join(COMPRESSIONS)}{near}"
