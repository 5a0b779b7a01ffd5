"""Tokens and lengths held against what a model has, before anything runs: a token without a row in the embedding, or a position
without a row in a position table, is an IndexError in the middle of a run (on a GPU a dead process).

Positions are a limit where the model holds something of their number: an embedding of positions, or a buffer (sine tables, causal
masks). Rotary and relative positions are computed for any length; beyond the length of the pretraining they are worth a note.
Cost: one pass over the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from ..errors import UserError

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
_OFFSETS = 8
"""Rows that a position table may have more than positions (OPT and BART have two)."""


def check_tokens(
    model: nn.Module, tokenizer, rows: Iterable[list[int]], more: int = 0, fix: str = "set max_length to {}"
) -> list[str]:
    """Notes about rows of token ids that a model is to read.

    Args:
        more: tokens that are written behind each row.
        fix: what the user can do about a row that is too long, with the length that fits.

    Raises:
        UserError: a token, or the padding token, outside of the embedding; a row longer than the model's positions.
    """
    longest, largest = 0, -1
    for row in rows:
        longest, largest = max(longest, len(row)), max(largest, *row) if row else largest
    embedding = model.get_input_embeddings()
    count = getattr(embedding, "num_embeddings", None) or len(embedding.weight)
    if largest >= count:
        raise UserError(
            f"token {largest} ({_word(tokenizer, largest)}) is outside of the model's embedding of {count} rows: the tokenizer is "
            "another model's, or has added tokens; run model.resize_token_embeddings(len(tokenizer)) and save both, or use the "
            "model's own tokenizer"
        )
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= count:
        raise UserError(
            f"the padding token {_word(tokenizer, pad)} is token {pad}, outside of the model's embedding of {count} rows; "
            "set pad_token in tokenizer_config.json to a token that the model has, such as eos_token"
        )
    positions, fixed = _positions(model)
    if positions is None or longest + more <= positions:
        return []
    shown = f"{longest} tokens" + (f" and {more} to write" if more else "")
    if fixed:
        raise UserError(f"the longest example has {shown}, the model {positions} positions; {fix.format(positions - more)}")
    return [f"note: the longest example has {shown}; the model was pretrained on up to {positions} positions"]


def _word(tokenizer, token: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(token)) if token < len(tokenizer) else "unknown to the tokenizer"


def _positions(model: nn.Module) -> tuple[int | None, bool]:
    """(the number of positions that the configuration names, whether something in the model has that many rows)."""
    positions = positions_of(getattr(model, "config", None))
    if positions is None:
        return None, False
    return positions, any(0 <= rows - positions <= extra for rows, extra in _tables(model))


def positions_of(config) -> int | None:
    """The number of positions that a model's configuration names; None where it names none."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = (getattr(config, name, None) for name in _POSITIONS)
    return next((n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def _tables(model: nn.Module) -> Iterator[tuple[int, int]]:
    """(rows, how many more than positions they may be) of whatever may be a table of positions."""
    words = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and id(module) not in words:
            yield module.num_embeddings, _OFFSETS
        if next(module.parameters(recurse=False), None) is not None:  # buffers of a layer have its widths
            continue
        loose = [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in [*module.buffers(recurse=False), *loose]:
            yield from ((size, 0) for size in tensor.shape)
