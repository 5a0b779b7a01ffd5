"""Plain text for continued pretraining: `text`, all of it learned, closed by the end-of-sequence token.

A text longer than max_length becomes several examples, so that nothing of it is lost (too_long: skip leaves it out). Text that was
rendered in a chat template before (Unsloth's notebooks) is taken as it is, its special tokens as the tokens that they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UserError
from ..encode import Encoded
from . import DataFormat


class Text(DataFormat):
    name, rank = "text", 60
    shown = "text"
    keys = (("text",),)
    usual = {"text": ("content", "document", "raw_content", "body")}

    def check(self, item: Mapping, where: str, settings) -> None:
        text = item.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where} has no text under 'text'")

    def encode(self, item: Mapping, tokenizer, settings):
        ids = tokenizer(item["text"])["input_ids"]
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        return Encoded(list(ids), [True] * len(ids), 0, divisible=True)

    def question(self, item: Mapping, settings) -> str:
        return item["text"]

    def asking(self, text: str) -> dict:
        return {"text": text}


FORMATS = (Text(),)
