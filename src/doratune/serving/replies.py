"""OpenAI's answers: whole, or in chunks as they come; of chats and of plain completions."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field

from .bodies import Body, ChatBody


@dataclass
class Reply:
    """The answers to one request.

    Args:
        prompt_tokens: of all prompts together; choices: how many answers.
    """

    body: Body
    prompt_tokens: int
    choices: int
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self.chat = isinstance(self.body, ChatBody)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)

    def usage(self, tokens: int) -> dict:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": self.prompt_tokens + tokens}

    def whole(self, texts: list[str], finishes: list[str], tokens: int) -> dict:
        """The answer of a request that does not stream."""
        choices = [self._choice(i, text, finish) for i, (text, finish) in enumerate(zip(texts, finishes, strict=True))]
        return self._head("chat.completion" if self.chat else "text_completion", choices) | {"usage": self.usage(tokens)}

    def begin(self) -> list[str]:
        """The events in front of all text."""
        if not self.chat:
            return []
        return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}}) for i in range(self.choices)]

    def piece(self, index: int, text: str, finish: str | None) -> list[str]:
        """The events of one piece of text; finish: why the answer ends with it."""
        if not self.chat:
            return [self._chunk(index, {"text": text}, finish)]
        events = [self._chunk(index, {"delta": {"content": text}})] if text else []
        return events + ([self._chunk(index, {"delta": {}}, finish)] if finish else [])

    def end(self, tokens: int) -> list[str]:
        """The events behind all text."""
        last = [self._event(self._head(self._kind, []) | {"usage": self.usage(tokens)})] if self.with_usage else []
        return [*last, "data: [DONE]\n\n"]

    @staticmethod
    def error(content: dict) -> str:
        """The event of an answer that fails once it has begun."""
        return Reply._event(content)

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str, choices: list[dict]) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model, "choices": choices}

    def _choice(self, index: int, text: str, finish: str) -> dict:
        own = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **own, "logprobs": None, "finish_reason": finish}

    def _chunk(self, index: int, own: dict, finish: str | None = None) -> str:
        choice = {"index": index, **own, "logprobs": None, "finish_reason": finish}
        return self._event(self._head(self._kind, [choice]) | ({"usage": None} if self.with_usage else {}))

    @staticmethod
    def _event(content: dict) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
