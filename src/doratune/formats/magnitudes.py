"""Which axis a magnitude in a file has: m per output row (O, 1…) or per input column (1, I…).

The shape says it, or the format. A bare vector of a format that has both is one per row or per column by its length; where the
layer is square it must be stated (LyCORIS issue 216: files of both kinds are around).
"""

from __future__ import annotations

from torch import Tensor

from ..errors import UserError

AXES = ("output", "input")


def vector_of(where: str, t: Tensor, shape: tuple[int, int], stated: str | None, axis: str | None = None) -> tuple[Tensor, str]:
    """(m as a vector, its axis).

    Args:
        where: the tensor's name, for errors.
        shape: (O, I) of the layer, I the input channels of a convolution.
        stated: the axis that the caller knows.
        axis: the axis that the format says of a bare vector; None: it says nothing.

    Raises:
        UserError: open, contradicting, or of another length than the layer has rows or columns.
    """
    rows, columns = shape
    by_shape = axis if t.dim() < 2 else _axis_of_shape(where, t)
    count = t.numel()
    if by_shape is None:
        fits = [name for name, size in zip(AXES, shape) if size == count]
        if stated is None and len(fits) == 2:
            raise UserError(
                f"{where} is a bare vector of {count} numbers and the layer is {rows} × {columns}: they can be one per output row "
                "or one per input column; say which: magnitude_axis output or input"
            )
        by_shape = stated or (fits[0] if fits else "output")
    elif stated is not None and stated != by_shape and count > 1:
        raise UserError(f"{where} has shape {tuple(t.shape)}, a magnitude on the {by_shape} axis; magnitude_axis says {stated!r}")
    wanted = rows if by_shape == "output" else columns
    if count != wanted:
        kind = "output rows" if by_shape == "output" else "input columns"
        raise UserError(
            f"{where} has shape {tuple(t.shape)}: {count} magnitudes for the {wanted} {kind} of a {rows} × {columns} layer"
        )
    return t.reshape(-1), by_shape


def _axis_of_shape(where: str, t: Tensor) -> str:
    wide = [i for i, size in enumerate(t.shape) if size > 1]
    if wide in ([], [0]):
        return "output"
    if wide == [1]:
        return "input"
    raise UserError(f"{where} has shape {tuple(t.shape)}; expected one magnitude per output row (O, 1…) or input column (1, I…)")
