"""What a request may say. Read by pydantic, straight from the bytes; what is not supported is refused by name, never dropped.

A field that this server does not have is accepted with the value that changes nothing (`presence_penalty: 0`), and so is what only
concerns accounts (`user`). null is the same as leaving a field out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..errors import near_misses
from .refusals import Refusal

MOST_CHOICES, MOST_PARTS = 16, 1000
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]

NEUTRAL: dict[str, tuple] = {
    "audio": (), "best_of": (1,), "echo": (False,), "frequency_penalty": (0,), "function_call": ("none", "auto"),
    "functions": ([],), "logit_bias": ({},), "logprobs": (False,), "modalities": (["text"],),
    "parallel_tool_calls": (True, False), "prediction": (), "presence_penalty": (0,), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],),
    "top_logprobs": (0,), "web_search_options": (),
}  # fmt: skip
"""OpenAI's fields that are not supported: the values that change nothing."""

ACCOUNT = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
"""Fields that say nothing about the answer."""


class Part(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MOST_PARTS)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: v for key, v in value.items() if v is not None} if isinstance(value, dict) else value

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        own = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return own if self.name is None else own | {"name": self.name}


class StreamOptions(BaseModel):
    """What a stream has besides its text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Body(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        """Take out what changes nothing; name what is not supported or not known."""
        if not isinstance(value, dict):
            raise PydanticCustomError("object", "the body is no JSON object")
        rest = {key: v for key, v in value.items() if v is not None and key not in ACCOUNT}
        for key, v in list(rest.items()):
            if key in cls.model_fields:
                continue
            if key not in NEUTRAL:
                raise PydanticCustomError("unknown", "{text}", {"text": _unknown(key, cls), "field": key})
            if not any(v == neutral and type(v) in (type(neutral), float) for neutral in NEUTRAL[key]):
                raise PydanticCustomError("unsupported", f"{key} is not supported here; leave it out", {"field": key})
            del rest[key]
        return rest

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def longest(self) -> int | None:
        """How many tokens an answer may have, if the request says."""
        return self.max_tokens


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> ChatBody:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("two lengths", "max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(Body):
    """POST /v1/completions; prompt: a text, texts, token ids, or lists of token ids."""

    prompt: Any

    @field_validator("prompt")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        rows = value if isinstance(value, list) else [value]
        kinds = {type(row) for row in rows}
        if kinds == {list}:
            kinds = {frozenset(map(type, row)) for row in rows}
        if not rows or any(row in ("", []) for row in rows):
            raise PydanticCustomError("empty", "the prompt is empty; give it some text")
        if kinds not in ({str}, {int}, {frozenset({int})}) or isinstance(value, int):
            raise PydanticCustomError("prompt", "expected a text, a list of texts, a list of token ids, or a list of such lists")
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)


B = TypeVar("B", bound=Body)


def read(cls: type[B], raw: bytes) -> B:
    """The request in the bytes of a body.

    Raises:
        Refusal: 400, with the field that is wrong.
    """
    try:
        return cls.model_validate_json(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
    # of the members of a union the one that was meant: where it fails deepest, and for more than its type
    problem = max(problems, key=lambda p: (len(p["loc"]), not p["type"].endswith("_type")))
    where = _where(problem["loc"], problem["type"] == "extra_forbidden")
    param = problem.get("ctx", {}).get("field") or (where.split(".")[0].split("[")[0] or None)
    message = f"{where}: {problem['msg']}" if where else problem["msg"]
    raise Refusal(400, message[:500], None if param is None else param[:100])


def _unknown(key: str, cls: type[Body]) -> str:
    known = [*cls.model_fields, *NEUTRAL, *ACCOUNT]
    return f"unknown field {key[:100]!r}{near_misses(key[:100], known)}"


def _where(loc: tuple, last: bool = False) -> str:
    """`messages[0].content`; without the names that pydantic gives to the members of a union. last: the last step is a name."""
    fields = {name for cls in (ChatBody, CompletionBody, Message, Part, StreamOptions) for name in cls.model_fields}
    text = ""
    for i, step in enumerate(loc):
        if isinstance(step, int):
            text += f"[{step}]"
        elif step in fields or (last and i == len(loc) - 1):
            text += f".{step}" if text else str(step)
    return text
