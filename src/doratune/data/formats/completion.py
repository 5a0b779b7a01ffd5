"""Prompt and completion (TRL's names): two texts, or two lists of messages; the completion alone is learned.

Texts are taken as they are under prompt: plain, closed by the end-of-sequence token, their special tokens as the tokens that they
are; under prompt: template they are a user turn and its answer. Messages are always rendered by the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UserError
from .. import chat, conversation
from ..encode import Encoded
from . import DataFormat


class Completion(DataFormat):
    name, aliases, rank = "completion", ("prompt_completion",), 45
    shown = "prompt, completion"
    keys = (("prompt", "completion"),)
    optional = ("tools",)
    inner = ("role", "content")
    usual = {"prompt": ("question", "query"), "completion": ("response", "answer", "reply", "output", "target")}

    def check(self, item: Mapping, where: str, settings) -> None:
        parts = [conversation.turns_or_text(item.get(name)) for name in ("prompt", "completion")]
        if any(isinstance(part, list) for part in parts):
            prompt, completion = self._turns(item, where, settings)
            conversation.check_answers(completion, where)
            conversation.check_calls([*prompt, *completion], conversation.tools_of(item.get("tools"), where), where)
            return
        for name in ("prompt", "completion"):
            if not isinstance(item.get(name), str) or not item[name].strip():
                raise UserError(f"{where} has no text under {name!r}; every item needs prompt and completion")

    def _turns(self, item: Mapping, where: str, settings) -> tuple[list[dict], list[dict]]:
        """(messages of the prompt, of the completion); a text is one turn."""
        turns = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            value = conversation.turns_or_text(item.get(name))
            if isinstance(value, str):
                turns.append([{"role": role, "content": value}])
            else:
                turns.append(conversation.messages_of(value, where, settings, name))
        return turns[0], turns[1]

    def encode(self, item: Mapping, tokenizer, settings):
        texts = all(isinstance(conversation.turns_or_text(item[name]), str) for name in ("prompt", "completion"))
        if texts and settings.prompt == "plain":
            prompt = tokenizer(item["prompt"])["input_ids"]
            prompt = prompt[:-1] if prompt and prompt[-1] == tokenizer.eos_token_id else prompt
            answer = tokenizer(item["completion"], add_special_tokens=False)["input_ids"]
            answer = answer if answer and answer[-1] == tokenizer.eos_token_id else [*answer, tokenizer.eos_token_id]
            return Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer), len(prompt))
        prompt, completion = self._turns(item, "it", settings)
        messages = [*prompt, *completion]
        answers = [i for i in conversation.learned(messages, settings.loss) if i >= len(prompt)]
        return chat.encode(messages, tokenizer, settings, conversation.tools_of(item.get("tools"), "it"), only=answers)

    def question(self, item: Mapping, settings) -> str:
        return conversation.asked([m for part in self._turns(item, "it", settings) for m in part])

    def asking(self, text: str) -> dict:
        return {"prompt": text, "completion": "."}

    def gold(self, item: Mapping, settings) -> str:
        return self._turns(item, "it", settings)[1][-1]["content"]


FORMATS = (Completion(),)
