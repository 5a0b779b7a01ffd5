"""Chat data: `messages` (role, content) in the tokenizer's own chat template; the answers are the assistant's turns.

The conversation is rendered once, as a whole, and tokenized as one text: those are the tokens of the example. Where its answers
stand in that text is read from the template's `{% generation %}` marks, or, where it has none, from a second rendering of each
turn with another answer in its place: what stays the same in front and behind is not the answer. An answer reaches to where its
turn closes (the end-of-turn token is learned). Thinking that a template takes out of earlier turns is therefore not learned
there, and what it puts in front of every answer (an empty `<think>` block) belongs to the prompt.

Cost: three renderings for an item of one answer, two more for each further answer; one tokenization.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from ..errors import UserError
from .encode import Encoded, encoded

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "zqANSWERqz"


def check(item: Mapping, where: str) -> None:
    """Raise for an item that is not a conversation with at least one assistant turn, none of them empty."""
    messages = item.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise UserError(f"{where} has no list of role and content under 'messages'")
    answers = [(n, m["content"]) for n, m in enumerate(messages, 1) if m["role"] == "assistant"]
    if not answers:
        raise UserError(f"{where} has no message of the role 'assistant', so there is no answer to learn")
    if empty := [n for n, content in answers if not content.strip()]:
        raise UserError(f"{where} has an empty answer (message {empty[0]}); fill it in or take the item out")


def encode(item: Mapping, tokenizer) -> Encoded:
    """Tokens of the conversation; the loss falls on what the assistant says.

    Raises:
        UserError: the tokenizer has no template, or the template mixes its turns so that no answer can be told from the rest.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; use instruction data instead")
    messages = item["messages"]
    if tokenizer.is_fast and _MARKED.search(tokenizer.get_chat_template()):
        settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        whole = tokenizer.apply_chat_template(messages, **settings)
        return Encoded.of_mask(whole["input_ids"], [bool(a) for a in whole["assistant_masks"]])
    text = _render(tokenizer, messages)
    spans = [_span(tokenizer, messages, i, text) for i, m in enumerate(messages) if m["role"] == "assistant"]
    if any(start >= end for start, end in spans) or any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} mixes the turns, so that no answer can be told from the rest; "
            "mark it with {% generation %}, or use one assistant turn per item"
        )
    return encoded(tokenizer, text, spans)


def _render(tokenizer, messages: Sequence[Mapping]) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=False)


def _span(tokenizer, messages: Sequence[Mapping], index: int, text: str) -> tuple[int, int]:
    """(first, behind the last) character of one answer in the rendered text, with what closes its turn."""
    word = _STAND_IN
    while word in text:
        word += "q"
    other = [*messages[:index], {**messages[index], "content": word}, *messages[index + 1 :]]
    before, _, behind = _render(tokenizer, other).partition(word)
    _, _, closing = _render(tokenizer, other[: index + 1]).partition(word)
    start = _common(text, before)
    end = len(text) - _common(text[start:][::-1], behind[::-1])
    return start, end + _common(text[end:], closing)


def _common(one: str, other: str) -> int:
    """Characters that two texts begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
