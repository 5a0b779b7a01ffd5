"""What a path is instead of the file or folder that a command needs, in the words of its messages."""

from __future__ import annotations

from pathlib import Path


def no_file(path: Path, what: str = "file") -> str:
    """`no such data file`, or that it is a folder."""
    return f"a folder, where one {what} is expected" if Path(path).is_dir() else f"no such {what}"


def no_folder(path: Path) -> str:
    """`no such folder`, or that it is a file."""
    return "a file, where a folder is expected" if Path(path).exists() else "no such folder"
