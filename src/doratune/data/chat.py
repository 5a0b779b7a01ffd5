"""Chat data: `messages` (role, content) in the tokenizer's own chat template; the answers are the assistant's turns."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UserError
from .encode import Encoded


def check(item: Mapping, where: str) -> None:
    """Raise for an item that is not a conversation with at least one assistant turn."""
    messages = item.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise UserError(f"{where} has no list of role and content under 'messages'")
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError(f"{where} has no message of the role 'assistant', so there is no answer to learn")


def encode(item: Mapping, tokenizer) -> Encoded:
    """Tokens of the conversation; the loss falls on what the assistant says, found by rendering turn by turn."""
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; use instruction data instead")
    messages, ids, answer, last = item["messages"], [], [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:index], generation=True)
        whole = _render(tokenizer, messages[: index + 1], generation=False)
        if whole[: len(prompt)] != prompt or prompt[: len(ids)] != ids:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} renders earlier turns differently as the conversation "
                "grows; use one assistant turn per item"
            )
        answer += [False] * (len(prompt) - len(ids)) + [True] * (len(whole) - len(prompt))
        ids, last = whole, len(prompt)
    return Encoded(ids, answer, last)


def _render(tokenizer, messages, generation: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
