"""The tokens of an example as text for the eye: special tokens as they are written, what is learned between two marks.

Cost: decoding each beginning that ends where learning begins or ends.
"""

from __future__ import annotations

import itertools
import re

from .encode import Encoded

BEGIN, END = "⟦", "⟧"
"""Around what is learned."""
_REPEATED = re.compile(r"(<[^<>\s]{1,60}>)\1{3,}")


def visible(example: Encoded, tokenizer, begin: str = BEGIN, end: str = END) -> str:
    """The text of an example.

    A token's text depends on those in front of it, so that each part is what the longer beginning has more than the shorter one.
    """
    text, position, shown = [], 0, ""
    for learned, run in itertools.groupby(example.answer):
        position += len(list(run))
        whole = tokenizer.decode(example.ids[:position], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        part, shown = whole[len(shown) :], whole
        text.append(f"{begin}{part}{end}" if learned else part)
    return _REPEATED.sub(_counted, "".join(text)) if example.images else "".join(text)


def _counted(match: re.Match) -> str:
    """A token that stands there many times, as an image's does, and how often."""
    return f"{match[1]} × {len(match[0]) // len(match[1])} "
