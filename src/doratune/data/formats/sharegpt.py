"""ShareGPT: `conversations` of from (human, gpt, system, function_call, observation) and value, with `tools` and `system`.

The layout of ShareGPT's exports as LLaMA-Factory and axolotl read it; a conversation becomes messages and is rendered by the
tokenizer's chat template, its function calls as tool calls.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UserError, kind_in_words
from .messages import Messages


class ShareGPT(Messages):
    name, aliases, rank = "sharegpt", (), 30
    shown = "conversations of from and value, tools, system"
    keys = (("conversations",),)
    optional = ("tools", "system")
    inner = ("from", "value")
    usual = {"conversations": ("conversation", "dialog", "dialogue", "turns")}
    list_key, names = "conversations", ("from", "value")

    def conversation(self, item: Mapping, where: str, settings) -> list[dict]:
        messages = super().conversation(item, where, settings)
        if not (system := item.get("system")):
            return messages
        if not isinstance(system, str):
            raise UserError(f"{where} has {kind_in_words(system)} under 'system'; expected text")
        if messages[0]["role"] == "system":
            raise UserError(f"{where} has a system text under 'system' and another as its first message; leave one")
        return [{"role": "system", "content": system}, *messages]


FORMATS = (ShareGPT(),)
