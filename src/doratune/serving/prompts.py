"""Messages and texts → the token ids that the model reads, held against the limits.

Done in one thread beside the event loop, with a tokenizer of its own: the tokenizers' Rust objects are not shared with the thread
that decodes.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import UserError
from ..generation.prompts import rendered
from .bodies import Body, ChatBody, CompletionBody
from .refusals import Refusal

COMPLETION_TOKENS = 16
"""Of a completion that names no length, as OpenAI's."""


@dataclass(frozen=True)
class Lengths:
    """How long prompts and answers may be.

    Args:
        positions: tokens of prompt and answer together, as the model has room for; None: any number.
        prompt: tokens of a prompt; None: what the model has room for.
        answer: tokens of an answer.
    """

    positions: int | None
    prompt: int | None
    answer: int

    def of(self, ids: Sequence[int], asked: int | None, chat: bool) -> int:
        """How many tokens the answer to this prompt may have.

        Raises:
            Refusal: the prompt is too long, or more is asked for than there is.
        """
        room = None if self.positions is None else self.positions - len(ids)
        most = self.prompt if self.prompt is not None else None if self.positions is None else self.positions - 1
        if not ids:
            raise Refusal(400, "the prompt has no tokens; give it some text", "messages" if chat else "prompt")
        if (most is not None and len(ids) > most) or (room is not None and room < 1):
            most = min(n for n in (most, None if room is None else self.positions - 1) if n is not None)
            raise _too_long(f"the prompt has {len(ids)} tokens, this server takes at most {most}", chat)
        if asked is not None and asked > self.answer:
            raise Refusal(400, f"max_tokens is {asked}; this server writes at most {self.answer} tokens", "max_tokens")
        if asked is not None and room is not None and asked > room:
            raise _too_long(f"the prompt's {len(ids)} tokens and {asked} new ones are more than the model's {self.positions}", chat)
        default = self.answer if chat else min(COMPLETION_TOKENS, self.answer)
        return asked or (default if room is None else min(default, room))


def _too_long(message: str, chat: bool) -> Refusal:
    return Refusal(400, message, "messages" if chat else "prompt", "context_length_exceeded")


class Prompts:
    """The tokenizer's side of the endpoints.

    Args:
        template: chat (the tokenizer's), instruction or plain, of the chat endpoint; auto: chat where the tokenizer has a template.
        tokens: how many the model knows.
    """

    def __init__(self, tokenizer, tokens: int, template: str = "auto"):
        self.tokenizer, self.tokens = copy.deepcopy(tokenizer), tokens
        self.template = ("chat" if tokenizer.chat_template else "plain") if template == "auto" else template
        if self.template == "chat" and not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; give --template instruction or plain")
        self.thread = ThreadPoolExecutor(1, "prompts")

    async def of(self, body: Body) -> list[list[int]]:
        """The token ids of each prompt of a request.

        Raises:
            Refusal: 400: the template refuses the messages, or a token id that the model does not have.
        """
        run = self._chat if isinstance(body, ChatBody) else self._completion
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, run, body)
        except UserError as error:
            raise Refusal(400, str(error), "messages" if isinstance(body, ChatBody) else "prompt") from None

    def _chat(self, body: ChatBody) -> list[list[int]]:
        messages = [message.plain() for message in body.messages]
        if self.template == "chat":
            return [rendered({"messages": messages}, self.tokenizer, "chat")]
        if [message["role"] for message in messages] != ["user"]:
            raise UserError(f"this server's template is {self.template!r}, which takes one message, of the user")
        return [rendered({"prompt": messages[0]["content"]}, self.tokenizer, self.template)]

    def _completion(self, body: CompletionBody) -> list[list[int]]:
        rows = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                rows.append(rendered({"prompt": prompt}, self.tokenizer, "plain"))
                continue
            if wrong := [token for token in prompt if not 0 <= token < self.tokens]:
                raise UserError(f"token id {wrong[0]} is none of the model's {self.tokens}")
            rows.append(list(prompt))
        return rows
