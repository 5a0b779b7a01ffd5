"""Files and folders that a command reads and that are not there: several are named in one line, before anything is read or loaded.

One alone is left to its reader, who says what belongs there. Cost: a stat of each name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError, listed

Names = str | Sequence[str] | None


def refuse_missing(files: Mapping[str, Names], folders: Mapping[str, Names] | None = None) -> None:
    """Raise UserError where two or more inputs of a command are not there.

    Args:
        files: {setting: its names}; a name of published data or of a hub, which no path has to have, is passed over.
        folders: {setting: its folders}, which can only be on this machine.
    """
    from ..data.containers import container_of

    def is_file(name: str) -> bool:
        return container_of(Path(name)) is not None or name.startswith(("/", "./", "../", "~"))

    absent = [
        f"{setting} {name}"
        for settings, local in ((files, is_file), (folders or {}, bool))
        for setting, names in settings.items()
        for name in _listed(names)
        if not os.path.exists(name) and local(name)
    ]
    if len(absent) > 1:
        raise UserError(f"no such files: {listed(absent, 10)}; check their paths")


def _listed(names: Names) -> list[str]:
    """The names of a setting, without the number of items that one may select: `my.jsonl[:100]`."""
    names = [names] if isinstance(names, str) else names or []
    return [re.sub(r"\[:\d+\]$", "", name) for name in dict.fromkeys(names) if name]
