"""Chat data as OpenAI, TRL and most hubs have it: `messages` of role and content, `tools`, tool calls and their results.

The tokenizer's chat template renders all of it (`data/chat.py`). A message's `train` or `weight` says whether it is learned, under
loss: item.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UserError
from .. import chat, conversation
from . import DataFormat


class Messages(DataFormat):
    name, aliases, rank = "chat", ("messages",), 20
    shown = "messages of role and content, tools"
    keys = (("messages",),)
    optional = ("tools",)
    inner = ("role", "content", "tool_calls")
    usual = {"messages": ("conversation", "dialog", "dialogue", "turns", "chat")}
    list_key, names, asking_roles = "messages", ("role", "content"), ("user", "assistant")

    def conversation(self, item: Mapping, where: str, settings) -> list[dict]:
        """The item's messages in our form."""
        return conversation.messages_of(item.get(self.list_key), where, settings, self.list_key, self.names)

    def check(self, item: Mapping, where: str, settings) -> None:
        if item.get("images") or item.get("image"):
            raise UserError(f"{where} has images, which {self.name} data has not; set data_format: visual")
        messages, tools = self.conversation(item, where, settings), conversation.tools_of(item.get("tools"), where)
        conversation.check_answers(messages, where)
        conversation.check_calls(messages, tools, where)

    def encode(self, item: Mapping, tokenizer, settings):
        messages = self.conversation(item, "it", settings)
        return chat.encode(messages, tokenizer, settings, conversation.tools_of(item.get("tools"), "it"))

    def notes(self, item: Mapping, settings) -> list[str]:
        return conversation.odd(self.conversation(item, "it", settings), settings)

    def question(self, item: Mapping, settings) -> str:
        return conversation.asked(self.conversation(item, "it", settings))

    def asking(self, text: str) -> dict:
        role, content = self.names
        turns = zip(self.asking_roles, (text, "."))
        return {self.list_key: [{role: name, content: words} for name, words in turns]}

    def gold(self, item: Mapping, settings) -> str:
        answers = [m for m in self.conversation(item, "it", settings) if m["role"] == "assistant"]
        return answers[-1]["content"]


FORMATS = (Messages(),)
