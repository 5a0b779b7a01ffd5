"""Random numbers of a checkpoint, for another number of processes than wrote it.

One process writes rng_state.pth, several write rng_state_0.pth and so on. A process without a file of its own takes the first
one's: all of them begin with the same seed, too. Cost: nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def load_rng_state(arguments, checkpoint: str | None, load: Callable[[str | None], None]) -> None:
    """Load what `load` (transformers') would find, under the name that it looks for."""
    wanted = f"rng_state_{arguments.process_index}.pth" if arguments.world_size > 1 else "rng_state.pth"
    names = [name for name in ("rng_state.pth", "rng_state_0.pth") if checkpoint and (Path(checkpoint) / name).is_file()]
    if not names or (Path(checkpoint) / wanted).is_file():
        return load(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(Path(checkpoint) / names[0], Path(folder) / wanted)
        return load(folder)
