"""What formats share that hold LoRA's A and B of linear layers and a magnitude per output row, nothing else: reading the pair with
its magnitude, and why another adapter cannot be said."""

from __future__ import annotations

from torch import Tensor

from ..errors import UserError, listed
from . import Format, Parts
from .magnitudes import vector_of
from .neutral import NeutralAdapter, NeutralLayer
from .source import Source


def pair_of(spelled: str, parts: dict[str, Tensor], names: tuple[str, str], flip: bool = False) -> tuple[Tensor, Tensor]:
    """(A (R, I), B (O, R)) of one module; flip: the file has them as (I, R) and (R, O).

    Raises:
        UserError: one without the other, or ranks that differ.
    """
    if missing := [name for name in names if name not in parts]:
        raise UserError(f"{spelled} has no {listed(missing)} beside {listed(sorted(parts))}")
    A, B = (parts[name] for name in names)
    if flip and A.dim() == B.dim() == 2:
        A, B = A.T.contiguous(), B.T.contiguous()
    if A.dim() < 2 or B.dim() < 2 or len(A) != B.shape[1]:
        raise UserError(f"{spelled}: {names[0]} and {names[1]} have shapes {tuple(parts[names[0]].shape)} and "
                        f"{tuple(parts[names[1]].shape)}, which do not fit each other")  # fmt: skip
    return A, B


def magnitude_of(spelled: str, part: str, parts: dict[str, Tensor], A: Tensor, B: Tensor, stated: str | None) -> Tensor | None:
    """m of the output axis, which these formats have, or None. Raises UserError for another axis or length."""
    if part not in parts:
        return None
    m, _ = vector_of(f"{spelled}.{part}", parts[part], (len(B), A.shape[1]), stated, axis="output")
    return m


def alpha_of(spelled: str, parts: dict[str, Tensor], rank: float, stated: float | None) -> float:
    """A module's own alpha, or the one that is stated, or its rank, which is what these programs take then."""
    if "alpha" not in parts:
        return rank if stated is None else stated
    if parts["alpha"].numel() != 1:
        raise UserError(f"{spelled}.alpha has shape {tuple(parts['alpha'].shape)}; expected one number")
    return float(parts["alpha"])


def all_layers(one: Format, source: Source, names: dict[str, str], parts: Parts, build) -> dict[str, NeutralLayer]:
    """`build(name in the file, name in the model, parts)` of every module; all that is wrong in one message."""
    layers, problems = {}, []
    for spelled, name in names.items():
        try:
            layers[name] = build(spelled, name, parts[spelled])
        except UserError as error:
            problems.append(str(error))
        except (RuntimeError, IndexError, ValueError, TypeError):  # torch's, of shapes that no rule above has named
            shapes = listed(f"{part} {tuple(t.shape)}" for part, t in sorted(parts[spelled].items()))
            problems.append(f"{spelled}: shapes that do not fit each other: {shapes}")
    if problems:
        raise UserError(f"{source.path} ({one.title}): {listed(problems, 12)}; it holds {source.holding()}")
    return layers


def linear_only(adapter: NeutralAdapter, whose: str, embeddings: bool = False, convolutions: bool = False) -> str | None:
    """Why a format of A, B and one magnitude per output row cannot say an adapter, or None."""
    if adapter.method not in ("lora", "dora"):
        return f"method is {adapter.method!r}, which {whose} has not: LoRA and DoRA only"
    if adapter.also_train or adapter.whole:
        return f"{listed(adapter.also_train or adapter.whole, 4)}: trained whole, which {whose} has no place for"
    for name, layer in adapter.layers.items():
        first = next(iter(layer.factors.values()))
        if layer.embedding and not embeddings:
            return f"{name} is an embedding, which {whose} has not"
        if first.dim() > 2 and not convolutions:
            return f"{name} is no linear layer, and {whose} has linear layers only"
        if layer.magnitude is not None and layer.axis == "input":
            return f"{name} has one magnitude per input column, and {whose} has one per output row only"
    return None
