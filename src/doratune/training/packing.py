"""Does a model keep packed examples apart? Asked of the model itself, before a run: another neighbour must change nothing.

Two rows that differ in their first example only, and the second example by itself: its logits must be the same three times. Models
whose layers carry a state along the row (Mamba, linear attention), or which make no mask from positions, fail. Cost: three short
forwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from ..adapter.verify import evaluating
from ..data.packing import PackingCollator, pack, without_mask
from ..errors import UserError
from .recipe import TrainRecipe
from .streaming import StreamedRows

_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 0.05, torch.bfloat16: 0.2}
"""The largest difference of logits, of their own size, that another shape of the same computation makes."""
_SAME_SHAPE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""The same where the shape is the same as well, so that all but the order of a few sums is."""


def check_packing(model, collate: PackingCollator) -> None:
    """Raise where examples of one row see each other, or the model cannot be told where they begin.

    Raises:
        UserError: no positions among the model's arguments; logits that depend on the neighbour.
    """
    name, fix = type(model).__name__, "set packing: false"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(f"packing needs a model that takes position_ids, and {name} does not; {fix}")
    generator = torch.Generator().manual_seed(0)
    size = min(model.get_input_embeddings().weight.shape[0], 1000)
    first, other, second = (torch.randint(3, size, (n,), generator=generator).tolist() for n in (7, 7, 9))
    with evaluating(model), torch.no_grad():
        one, two, alone = (_logits(model, collate, rows, len(second)) for rows in ([first, second], [other, second], [second]))
    scale = alone.abs().max().clamp_min(1e-6)
    if (one - two).abs().max() > _SAME_SHAPE.get(model.dtype, 1e-2) * scale:
        raise UserError(f"packing: {name} lets the examples of a row see each other; {fix}")
    if (one - alone).abs().max() > _ROUNDING.get(model.dtype, 0.2) * scale:
        raise UserError(f"packing: {name} gives an example other positions in a row than by itself; {fix}")


def packed_rows(
    rows: list[dict] | StreamedRows, recipe: TrainRecipe, collate: PackingCollator, model, say: Callable[[str], None]
) -> list[dict] | StreamedRows:
    """The examples of a run in rows of max_length tokens, for a model that keeps them apart; how full they are is said.

    Raises:
        UserError: see `check_packing`.
    """
    check_packing(model, collate)
    if isinstance(rows, StreamedRows):
        rows.packing = True
        return rows
    packs = pack(rows, recipe.max_length, recipe.seed)
    full = sum(row["length"] for row in packs) / (len(packs) * recipe.max_length)
    say(
        f"packing: {len(rows)} examples in {len(packs)} rows of {recipe.max_length} tokens, {full:.0%} full; batch_size "
        f"({recipe.batch_size}) counts rows"
    )
    return packs


def _logits(model, collate: PackingCollator, examples: list[list[int]], count: int) -> torch.Tensor:
    """The last `count` logits of a row that holds these examples in this order."""
    ids = [token for one in examples for token in one]
    row = {"input_ids": ids, "labels": ids, "lengths": [len(one) for one in examples]}
    batch = collate([row | {"length": len(ids)}])
    inputs = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in without_mask(batch).items()}
    inputs = {k: v for k, v in inputs.items() if k not in ("labels", "logits_to_keep")}
    return model(**inputs).logits[0, -count:].float()
