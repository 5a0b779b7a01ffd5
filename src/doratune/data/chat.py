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
MARK = "<image>"
"""Where an image stands in the text of a message, in LLaVA's data and others'."""
_OF_ANSWERS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""What an answer may consist of beside its content."""


def encode(
    messages: Sequence[Mapping],
    tokenizer,
    settings: DataSettings,
    tools=None,
    only: Sequence[int] | None = None,
    images: Sequence = (),
) -> Encoded:
    """Tokens of a conversation; the loss falls on what the assistant says.

    Args:
        messages: in the form of `conversation.messages_of`.
        only: indices of the messages that are learned, instead of what the settings say.
        images: sources of the images, one for each mark `<image>` in the messages, in order; the tokenizer is an `ImageReader`.

    Raises:
        UserError: the tokenizer has no template; the template has no place for a part of it, or mixes its turns so that no answer
            can be told from the rest; turns out of order; words that are special tokens.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; use instruction data instead")
    if settings.turn_order == "strict":
        conversation.check_order(messages)
    if settings.special_tokens == "refuse":
        words = ((f"message {n} ({m['role']})", m["content"]) for n, m in enumerate(messages, 1))
        check_words(((where, text.replace(MARK, "") if images else text) for where, text in words), tokenizer)
    indices = conversation.learned(messages, settings.loss) if only is None else list(only)
    turns = conversation.rendered_form(messages, settings)
    places = [list(turns).index(i) for i in indices]
    if getattr(tokenizer, "in_parts", False):
        content = [turn | {"content": parts_of_text(turn["content"], bool(images))} for turn in turns.values()]
        return _with_images(_Rendering(tokenizer, content, tools), places, images)
    return _Rendering(tokenizer, list(turns.values()), tools).encoded(places)


def parts_of_text(text: str, marked: bool) -> list[dict]:
    """A text as a list of parts, an image for each of its marks; white space around a mark is the template's."""
    if not marked:
        return [{"type": "text", "text": text}]
    parts = []
    for number, piece in enumerate(text.split(MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return parts


def _with_images(rendering: _Rendering, places: Sequence[int], images: Sequence) -> Encoded:
    """The tokens of a conversation in the template of a processor, each image in its place.

    A template that closes an answer by no special token (LLaVA's) gets the end-of-sequence token there: so the model
    learns to stop."""
    reader = rendering.tokenizer
    text, spans = _closed(rendering.text, rendering.spans(places), reader)
    plain = encoded(reader, text, spans)
    ids, origins = reader.expanded(plain.ids, images)
    reader.check(text, images, ids)
    lead = reader.leading(text)
    of_image = [False] * len(lead) + [plain.ids[i] == reader.mark for i in origins]
    answer = [False] * len(lead) + [plain.answer[i] for i in origins]
    example = Encoded.of_mask([*lead, *ids], answer)
    return example._replace(images=tuple(images), of_image=of_image)


def _closed(text: str, spans: Sequence[tuple[int, int]], tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text with every answer closed by a special token."""
    special = tuple({str(t) for t in [*tokenizer.added_tokens_decoder.values(), *tokenizer.all_special_tokens]})
    whole, closed, behind = "", [], 0
    for start, end in spans:
        answer = text[start:end].rstrip()
        whole += text[behind:start]
        first = len(whole)
        closing = "" if answer.endswith(special) else tokenizer.eos_token
        whole += answer + closing + text[start + len(answer) : end]
        closed.append((first, first + len(answer + closing) if closing else len(whole)))
        behind = end
    return whole + text[behind:], closed


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
        spans = self.spans(places)
        example = encoded(self.tokenizer, self.text, spans)
        if marks is None:
            return example
        return Encoded.of_mask(example.ids, [a and b for a, b in zip(example.answer, marks[1], strict=True)])

    def spans(self, places: Sequence[int]) -> list[tuple[int, int]]:
        """Where these answers stand in the text.

        Raises:
            UserError: no answer can be told from the rest.
        """
        spans = [self._span(i) for i in places]
        if any(start >= end for start, end in spans) or any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} mixes the turns, so that no answer can be told from the rest; "
                "mark it with {% generation %}, or use one assistant turn per item"
            )
        return spans

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
        if lost := [m for m in system if _plain(m) and _plain(m) not in text]:
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
        if not isinstance(self.turns[index]["content"], str):
            turn["content"] = [{"type": "text", "text": word}]
        other = [*self.turns[:index], turn, *self.turns[index + 1 :]]
        before, _, behind = self._render(other).partition(word)
        _, _, closing = self._render(other[: index + 1]).partition(word)
        start = _common(self.text, before)
        end = len(self.text) - _common(self.text[start:][::-1], behind[::-1])
        return start, end + _common(self.text[end:], closing)


def _plain(turn: Mapping) -> str:
    """The text of a turn, without space around it."""
    content = turn["content"]
    return (content if isinstance(content, str) else "".join(part.get("text", "") for part in content)).strip()


def _common(one: str, other: str) -> int:
    """Characters that two texts begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
