"""Alpaca: `instruction`, optional `input`, `output`; `system` and `history` as LLaMA-Factory has them.

Under prompt: plain the Alpaca prompt of the paper's commonsense experiments (`data/instruction.py`), under published that of the
published scripts to the space, under template a conversation in the tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UserError, kind_in_words
from .. import chat, conversation, instruction, published_prompts
from ..words import check_words
from . import DataFormat


class Instruction(DataFormat):
    name, aliases, rank = "instruction", ("alpaca",), 40
    shown = "instruction, input, output"
    keys = (("instruction", "output"),)
    optional = ("input", "system", "history")
    usual = {
        "instruction": ("question", "query", "prompt", "problem", "input"),
        "output": ("answer", "response", "reply", "completion", "solution", "target"),
    }

    def check(self, item: Mapping, where: str, settings) -> None:
        instruction.check(item, where)
        history = item.get("history") or []
        if not isinstance(history, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
        ):
            raise UserError(f"{where} has no pairs of question and answer under 'history'")
        for name in ("system", "history"):
            if item.get(name) and settings.prompt != "template":
                raise UserError(f"{where} has a {name!r}, for which prompt {settings.prompt} has no place; set prompt: template")
        if not isinstance(item.get("system") or "", str):
            raise UserError(f"{where} has {kind_in_words(item['system'])} under 'system'; expected text")

    def conversation(self, item: Mapping) -> list[dict]:
        """The item as messages."""
        turns = [{"role": "system", "content": item["system"]}] if item.get("system") else []
        for question, answer in item.get("history") or []:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = f"{item['instruction']}\n\n{item['input']}" if item.get("input") else item["instruction"]
        return [*turns, {"role": "user", "content": text}, {"role": "assistant", "content": item["output"]}]

    def encode(self, item: Mapping, tokenizer, settings):
        if settings.prompt == "template":
            return chat.encode(self.conversation(item), tokenizer, settings)
        if settings.prompt == "published":
            return published_prompts.encode(item, tokenizer)
        if settings.special_tokens == "refuse":
            check_words(((name, item.get(name) or "") for name in ("instruction", "input", "output")), tokenizer)
        return instruction.encode(item, tokenizer)

    def question(self, item: Mapping, settings) -> str:
        return conversation.asked(self.conversation(item))

    def asking(self, text: str) -> dict:
        return {"instruction": text, "output": "."}

    def gold(self, item: Mapping, settings) -> str:
        return item["output"]


FORMATS = (Instruction(),)
