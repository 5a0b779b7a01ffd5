"""Text files that users and other programs wrote: UTF-8 with or without a byte-order mark, and lines that end where JSONL says.

`str.splitlines` also splits at U+2028, U+2029, U+0085, form feeds and more, all of which may stand inside a JSON string.
Cost: one copy of the text.
"""

from __future__ import annotations

from pathlib import Path

ENCODING = "utf-8-sig"
"""UTF-8; a byte-order mark in front is left out."""


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a UTF-8 file as it is written: no line end is translated, a byte-order mark is left out.

    Raises:
        OSError, UnicodeDecodeError: as `Path.read_text` does.
    """
    return path.read_bytes().decode(ENCODING, errors)


def lines(text: str) -> list[str]:
    """The lines of a text, which end in a line feed or in carriage return and line feed, and in nothing else."""
    parts = text.split("\n")
    return [part.removesuffix("\r") for part in (parts[:-1] if parts[-1] == "" else parts)]
