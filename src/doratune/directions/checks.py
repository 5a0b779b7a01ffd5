"""What is wrong with a direction's declaration, in one line that names the tensor or the method."""

from __future__ import annotations

from torch import nn

from ..errors import listed
from . import Direction, file_names

RESERVED = ("weight", "bias", "magnitude", "magnitude_delta", "magnitude_start", "adapted", "scaling", "embedding_A", "embedding_B")
"""Names that an adapted layer or an adapter file gives to something else."""

OF_FILES = ("lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B")
"""The same in a file."""


def not_defined(direction: Direction) -> str | None:
    """Which methods it lacks, or None."""
    missing = [name for name in ("first", "factors") if getattr(getattr(direction, name), "__isabstractmethod__", False)]
    if missing == ["first"] and type(direction).create is not Direction.create:
        return None
    return f"it does not define {listed(missing)}; see doratune.directions.Direction" if missing else None


def tensor_problem(direction: Direction) -> str | None:
    """Which of its tensors cannot be, and why, or None."""
    names, files = list(direction.names), list(file_names(direction).values())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        return f"two tensors are called {listed(twice)}; give each a name of its own"
    bare = [declared.name for declared in direction.tensors if declared.shape is None]
    if bare and type(direction).shapes is Direction.shapes:
        return f"{listed(bare)} has no shape; declare shape=lambda O, I, R: (...)"
    if clash := [name for name in names if name in RESERVED or "." in name or hasattr(nn.Module(), name)]:
        return f"a tensor cannot be called {listed(clash)}; the layer uses that name itself"
    taken = [file for file in files if file.removesuffix(".weight") in OF_FILES]
    if wrong := sorted({file for file in files if files.count(file) > 1} | set(taken)):
        return f"in a file, {listed(wrong)} would be two things; give each tensor an in_file of its own"
    return None
