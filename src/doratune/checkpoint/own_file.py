"""doratune.json beside adapter_config.json, which PEFT or a hand may have changed since: ours counts where both say the same."""

from __future__ import annotations

from pathlib import Path

from ..adapter.targets import name_matches
from ..config import AdapterConfig
from ..directions import direction_of
from ..errors import UserError
from . import peft


def agreeing(own: AdapterConfig, theirs: AdapterConfig, folder: Path, ours: bool) -> AdapterConfig:
    """doratune.json's configuration, if adapter_config.json (ours: of our type) says the same.

    Raises:
        UserError: a setting in which the two differ.
    """
    written = peft.as_written(own)
    compared = ["method", "rank"]
    compared += [] if _same_modules(written.also_train, theirs.also_train) else ["also_train"]
    compared += [] if not direction_of(theirs.method).scaled else ["alpha", "rank_scaling"]
    compared += ["magnitude_axis", "embedding_magnitude"] if ours else []
    for name in compared:
        if getattr(written, name) != getattr(theirs, name):
            raise UserError(
                f"{folder}: {peft.OWN_FILE} says {name} {getattr(written, name)!r}, adapter_config.json says "
                f"{getattr(theirs, name)!r}; delete {peft.OWN_FILE} if adapter_config.json is right"
            )
    return own


def _same_modules(entries: tuple[str, ...], written: tuple[str, ...]) -> bool:
    """Does `modules_to_save` say what `also_train` does? It may hold full names where PEFT would take entries otherwise."""
    each = all(any(name_matches((entry,), name) for name in written) for entry in entries)
    return entries == written or (each and all(name_matches(entries, name) for name in written))
