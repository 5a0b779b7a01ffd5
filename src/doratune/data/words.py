"""Words of an item that a tokenizer would read as its special tokens: `<|im_end|>` in a user's text ends the turn for the model.

Every token that the tokenizer calls special, as text; one regular expression for all of them. Cost: one search of each text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from ..errors import UserError

_PATTERNS: WeakKeyDictionary = WeakKeyDictionary()
"""Tokenizer → (its number of tokens, the expression that finds its special ones): a memory of what it says, nothing more."""


def check_words(texts: Iterable[tuple[str, str]], tokenizer) -> None:
    """Raise for the first text that spells a special token.

    Args:
        texts: (what it is, for the message; the text).

    Raises:
        UserError: the text and the token.
    """
    pattern = _pattern(tokenizer)
    for what, text in texts:
        if pattern is not None and (match := pattern.search(text)):
            raise UserError(
                f"{what} holds the special token {match[0]!r}, which the model would read as one; take it out, or set "
                "special_tokens: keep"
            )


def _pattern(tokenizer) -> re.Pattern | None:
    size, pattern = _PATTERNS.get(tokenizer, (None, None))
    if size != len(tokenizer):
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        tokens = sorted({str(t) for t in [*added, *tokenizer.all_special_tokens] if str(t).strip()}, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        _PATTERNS[tokenizer] = len(tokenizer), pattern
    return pattern
