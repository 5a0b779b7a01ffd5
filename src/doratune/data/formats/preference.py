"""Preference pairs: `chosen` and `rejected` answers to one prompt, for DPO.

    prompt, chosen, rejected             texts, or lists of messages (TRL)
    chosen, rejected                     two whole conversations with the same beginning (HH-RLHF, UltraFeedback)
    conversations or messages, chosen, rejected    a conversation and two answers (LLaMA-Factory)
    instruction, input, chosen, rejected           Alpaca's prompt and two answers

`pairs` gives them in the one form that TRL's DPOTrainer takes; docs/data.md shows the way there. `doratune train` learns answers,
not preferences, and refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UserError, kind_in_words
from .. import chat, conversation
from . import DataFormat

SIDES = ("chosen", "rejected")


class Preference(DataFormat):
    name, aliases, rank = "preference", ("dpo",), 10
    shown = "prompt, chosen, rejected"
    keys = (SIDES,)
    optional = ("prompt", "conversations", "messages", "instruction", "input", "system", "tools")
    inner = ("role", "content", "from", "value")
    usual = {"chosen": ("preferred", "accepted", "win"), "rejected": ("dispreferred", "refused", "lose")}
    learns = False

    def pair(self, item: Mapping, where: str, settings) -> tuple[list[dict], list[dict], list[dict]]:
        """(messages of the prompt, of the chosen answer, of the rejected one).

        Raises:
            UserError: a side without an answer, sides that are the same, no prompt.
        """
        chosen, rejected = (self._side(item, name, where, settings) for name in SIDES)
        if chosen[0] == rejected[0] and chosen[0]["role"] != "assistant":  # two whole conversations
            common = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
            prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        else:
            prompt = self._prompt(item, where, settings)
        for name, side in zip(SIDES, (chosen, rejected)):
            if not side and chosen != rejected:
                raise UserError(f"{where} has no answer under {name!r} behind what both share; take the item out")
        if chosen == rejected:
            raise UserError(f"{where} has the same answer under 'chosen' and 'rejected'; take the item out")
        if not prompt:
            raise UserError(f"{where} has no prompt, and its answers do not begin alike; give the prompt under 'prompt'")
        if prompt[-1]["role"] == "assistant":
            raise UserError(f"{where} has a prompt that ends with the assistant's turn; end it with a user turn")
        for name, side in zip(SIDES, (chosen, rejected)):
            conversation.check_answers(side, f"{where}, {name!r}")
        return prompt, chosen, rejected

    def _prompt(self, item: Mapping, where: str, settings) -> list[dict]:
        """The messages in front of both answers, from the first of these fields that there is."""
        value = conversation.turns_or_text(item.get("prompt"))
        key = next((key for key in ("conversations", "messages") if value is None and item.get(key) is not None), "prompt")
        if key != "prompt" or isinstance(value, list):
            turns = conversation.messages_of(value if key == "prompt" else item[key], where, settings, key)
        else:
            text = value if value is not None else item.get("instruction")
            if not isinstance(text, str | None):
                raise UserError(f"{where} has {kind_in_words(text)} under 'prompt'; expected text or messages")
            text = f"{text}\n\n{item['input']}" if text and item.get("input") else text
            turns = [{"role": "user", "content": text}] if text and text.strip() else []
        system = item.get("system")
        return [{"role": "system", "content": system}, *turns] if isinstance(system, str) and system and turns else turns

    def _side(self, item: Mapping, name: str, where: str, settings) -> list[dict]:
        value = conversation.turns_or_text(item.get(name))
        if isinstance(value, str):
            if not value.strip():
                raise UserError(f"{where} has an empty answer under {name!r}; fill it in or take the item out")
            return [{"role": "assistant", "content": value}]
        value = [value] if isinstance(value, Mapping) else value
        if not isinstance(value, list):
            raise UserError(f"{where} has no text under {name!r}; expected an answer, or messages")
        return conversation.messages_of(value, where, settings, name)

    def check(self, item: Mapping, where: str, settings) -> None:
        self.pair(item, where, settings)
        conversation.tools_of(item.get("tools"), where)

    def parts(self, item: Mapping, tokenizer, settings):
        prompt, *sides = self.pair(item, "it", settings)
        tools = conversation.tools_of(item.get("tools"), "it")
        out = []
        for name, side in zip(SIDES, sides, strict=True):
            messages = [*prompt, *side]
            answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= len(prompt)]
            out.append((name, chat.encode(messages, tokenizer, settings, tools, only=answers)))
        return out

    def encode(self, item: Mapping, tokenizer, settings):
        return self.parts(item, tokenizer, settings)[0][1]

    def question(self, item: Mapping, settings) -> str:
        return conversation.asked(self.pair(item, "it", settings)[0])


FORMATS = (Preference(),)
