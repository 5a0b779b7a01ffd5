"""Conversations in the tokenizer's own chat template; the answers are the assistant's turns, its tool calls among them.

The conversation is rendered once, as a whole, and tokenized as one text: those are the tokens of the example. Where its answers
stand in that text is read from the template's `{% generation %}` marks, or, where it has none, from a second rendering of each
turn with another answer in its place: what stays the same in front and behind is not the answer. An answer reaches to where its
turn closes (the end-of-turn token is learned). Thinking that a template takes out of earlier turns is therefore not learned
there, and what it puts in front of every answer (an empty `<think>` block) belongs to the prompt.

What a template loses (a system text, tools) is an error, not a silent difference. Cost: three renderings for an item of one answer,
two more for each further answer, one more for tools; one tokenization.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from . import conversation
from .encode import Encoded, encoded
from .words import check_words

if TYPE_CHECKING:
    from .settings import DataSettings

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "zqANSWERqz"
_OF_ANSWERS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""What an answer may consist of beside its content."""


def encode(
    messages: Sequence[Mapping], tokenizer, settings: DataSettings, tools=None, only: Sequence[int] | None = None
) -> Encoded:
    """Tokens of a conversation; the loss falls on what the assistant says.

    Args:
        messages: in the form of `conversation.messages_of`.
        only: indices of the messages that are learned, instead of what the settings say.

    Raises:
        UserError: the tokenizer has no template; the template has no place for a part of it, or mixes its turns so that no answer
            can be told from the rest; turns out of order; words that are special tokens.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; use instruction data instead")
    if settings.turn_order == "strict":
        conversation.check_order(messages)
    if settings.special_tokens == "refuse":
        check_words(((f"message {n} ({m['role']})", m["content"]) for n, m in enumerate(messages, 1)), tokenizer)
    indices = conversation.learned(messages, settings.loss) if only is None else list(only)
    turns = conversation.rendered_form(messages, settings)
    return _Rendering(tokenizer, list(turns.values()), tools).encoded([list(turns).index(i) for i in indices])


class _Rendering:
    """One conversation in one template."""

    def __init__(self, tokenizer, turns: list[dict], tools):
        self.tokenizer, self.turns, self.tools = tokenizer, turns, tools
        self.text = self._whole()

    def encoded(self, places: list[int]) -> Encoded:
        answers = [i for i, m in enumerate(self.turns) if m["role"] == "assistant"]
        marks = self._marks() if self.tokenizer.is_fast and _MARKED.search(self.tokenizer.get_chat_template()) else None
        if marks is not None and places == answers:
            return Encoded.of_mask(*marks)
        spans = [self._span(i) for i in places]
        if any(start >= end for start, end in spans) or any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} mixes the turns, so that no answer can be told from the rest; "
                "mark it with {% generation %}, or use one assistant turn per item"
            )
        example = encoded(self.tokenizer, self.text, spans)
        if marks is None:
            return example
        return Encoded.of_mask(example.ids, [a and b for a, b in zip(example.answer, marks[1], strict=True)])

    def _marks(self) -> tuple[list[int], list[bool]]:
        settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        whole = self.tokenizer.apply_chat_template(self.turns, tools=self.tools, **settings)
        return whole["input_ids"], [bool(a) for a in whole["assistant_masks"]]

    def _render(self, turns: Sequence[Mapping], tools=None) -> str:
        tools = self.tools if tools is None else tools
        return self.tokenizer.apply_chat_template(list(turns), tools=tools or None, tokenize=False, add_generation_prompt=False)

    def _whole(self) -> str:
        """The text.

        Raises:
            UserError: the template refuses or drops the system text, or drops the tools.
        """
        system = [m for m in self.turns if m["role"] in ("system", "developer")]
        name, fix = f"the chat template of {self.tokenizer.name_or_path}", "set system_as: user to put it into the first user turn"
        try:
            text = self._render(self.turns)
        except Exception:
            if system and self._renders([m for m in self.turns if m not in system]):
                raise UserError(f"{name} has no role for a {system[0]['role']} text; {fix}") from None
            raise
        if lost := [m for m in system if m["content"].strip() and m["content"].strip() not in text]:
            raise UserError(f"{name} drops the {lost[0]['role']} text; {fix}")
        fix = "use a model whose template has a place for tools, or take the item out"
        if self.tools and self._render(self.turns, tools=[]) == text:
            raise UserError(f"{name} drops the list of tools; {fix}")
        calls = [call["function"]["name"] for m in self.turns for call in m.get("tool_calls", ())]
        if lost := [call for call in calls if call not in text]:
            raise UserError(f"{name} drops the call of the tool {lost[0]!r}; {fix}")
        return text

    def _renders(self, turns: Sequence[Mapping]) -> bool:
        try:
            return bool(self._render(turns))
        except Exception:  # a template raises what it likes
            return False

    def _span(self, index: int) -> tuple[int, int]:
        """(first, behind the last) character of one answer in the rendered text, with what closes its turn."""
        word = _STAND_IN
        while word in self.text:
            word += "q"
        turn = {k: v for k, v in self.turns[index].items() if k not in _OF_ANSWERS} | {"content": word}
        other = [*self.turns[:index], turn, *self.turns[index + 1 :]]
        before, _, behind = self._render(other).partition(word)
        _, _, closing = self._render(other[: index + 1]).partition(word)
        start = _common(self.text, before)
        end = len(self.text) - _common(self.text[start:][::-1], behind[::-1])
        return start, end + _common(self.text[end:], closing)


def _common(one: str, other: str) -> int:
    """Characters that two texts begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
