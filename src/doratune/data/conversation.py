"""Conversations in one form, whatever a file calls their parts: role, content as text, tool calls with arguments as an object.

That is the form that chat templates of transformers take (OpenAI's messages, arguments parsed). What a conversation cannot be is
said with the number of its message. Sources: OpenAI's chat format, ShareGPT's and LLaMA-Factory's names of roles. Cost: one pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError, kind_in_words, listed, near_misses, with_article

if TYPE_CHECKING:
    from .settings import DataSettings

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "observation": "tool", "tool_response": "tool",
    "function_response": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
SPELLINGS = (("role", "content"), ("from", "value"))
"""What messages call role and content: OpenAI's names and ShareGPT's, under either key."""
CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT whose text is the call itself, in JSON."""
_FLAGS = ("train", "weight")


def messages_of(value: Any, where: str, settings: DataSettings, key: str = "messages", names=("role", "content")) -> list[dict]:
    """The messages under a key.

    Args:
        names: what this format calls role and content.

    Raises:
        UserError: no list of messages, a role that is none, content that is no text.
    """
    value = parsed(value)
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) for m in value):
        raise UserError(f"{where} has no list of {names[0]} and {names[1]} under {key!r}")
    names = next((spelling for spelling in (names, *SPELLINGS) if spelling[0] in value[0]), names)
    return [_message(m, f"{where}, message {n}", settings, names, len(value)) for n, m in enumerate(value, 1)]


def parsed(value: Any) -> Any:
    """A list or an object that a table holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def turns_or_text(value: Any) -> Any:
    """A list of messages, also one that a table holds as JSON text; any other text stays text, JSON as it may be."""
    inner = parsed(value)
    messages = (
        isinstance(inner, list) and bool(inner) and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in inner)
    )
    return inner if messages or not isinstance(value, str) else value


def _message(message: Mapping, where: str, settings: DataSettings, names: tuple[str, str], count: int) -> dict:
    role_name, content_name = names
    role = message.get(role_name)
    if not isinstance(role, str):
        keys = listed(map(repr, message), 6) or "none"
        raise UserError(f"{where} has no text under {role_name!r}; its keys are {keys}: rename them by columns")
    name = settings.roles.get(role, SHAREGPT_ROLES.get(role, role))
    if name not in ROLES and role not in settings.roles:
        near = near_misses(role, [*ROLES, *SHAREGPT_ROLES])
        raise UserError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}, or set roles: {{{role}: ROLE}}{near}")
    rest = {k: v for k, v in message.items() if k not in (role_name, content_name, "tool_calls")}
    calls, content = message.get("tool_calls"), message.get(content_name)
    if role in CALLS and role not in settings.roles:
        calls, content = parsed(content), ""
    whole = rest | {"role": name, "content": _text(content, where, content_name, bool(calls))}
    if calls:
        whole["tool_calls"] = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
    return whole


def _text(content: Any, where: str, name: str, calls: bool) -> str:
    """The text of a message, also of one in parts; that of a tool call may be missing."""
    if content is None and calls:
        return ""
    if isinstance(content, list):
        kinds = [part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        other = next((kind for kind in kinds if kind != "text"), "part without text")
        raise UserError(f"{where} holds a part of the type {other!r} under {name!r}; text alone is learned: take the item out")
    if isinstance(content, str):
        return content
    raise UserError(f"{where} has {kind_in_words(content)} under {name!r}; expected text (tool calls go under 'tool_calls')")


def _call(call: Any, where: str) -> dict:
    """A tool call as templates take it: {type, id, function: {name, arguments}}."""
    outer = call if isinstance(call, Mapping) else {}
    inner = outer.get("function", outer)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not name:
        raise UserError(f'{where} has a tool call without a \'name\'; expected {{"name": …, "arguments": {{…}}}} in JSON')
    arguments = parsed(inner.get("arguments") or {})
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where} calls {name!r} with arguments that are no JSON object; mend them")
    rest = {"id": outer["id"]} if isinstance(outer.get("id"), str) else {}
    return {"type": "function", **rest, "function": {"name": name, "arguments": dict(arguments)}}


def tools_of(value: Any, where: str, key: str = "tools") -> list[dict] | None:
    """Descriptions of tools as templates take them: {type: function, function: {name, description, parameters}}.

    Raises:
        UserError: no list, or a tool without a name.
    """
    value = parsed(value)
    if not value:
        return None
    if not isinstance(value, list):
        raise UserError(f"{where} has no list under {key!r}; expected a list of tools, or its JSON text")
    tools = []
    for number, tool in enumerate(value, 1):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise UserError(f"{where}: tool {number} under {key!r} has no 'name'")
        tools.append({"type": "function", "function": dict(inner)})
    return tools


def check_answers(messages: Sequence[Mapping], where: str) -> None:
    """Raise for a conversation without an answer, or with an empty one."""
    answers = [(n, m) for n, m in enumerate(messages, 1) if m["role"] == "assistant"]
    if not answers:
        raise UserError(f"{where} has no message of the role 'assistant', so there is no answer to learn")
    if empty := [n for n, m in answers if not m["content"].strip() and not m.get("tool_calls")]:
        raise UserError(f"{where} has an empty answer (message {empty[0]}); fill it in or take the item out")


def check_calls(messages: Sequence[Mapping], tools: Sequence[Mapping] | None, where: str) -> None:
    """Raise for a call of a tool that the item does not list; without any list, nothing is known of its tools."""
    known = [tool["function"]["name"] for tool in tools or ()]
    for number, message in enumerate(messages, 1):
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if known and name not in known:
                raise UserError(
                    f"{where}, message {number} calls the tool {name!r}; its tools are {listed(known)}{near_misses(name, known)}"
                )


def check_order(messages: Sequence[Mapping]) -> None:
    """Raise for turns out of order; a call and the answer to its result are two turns of the assistant.

    Raises:
        UserError: the message, and what stands where.
    """
    more = "mend it, or set turn_order: any"
    before = None
    for number, message in enumerate(messages, 1):
        role, last = message["role"], before["role"] if before else None
        if role in ("system", "developer") and last not in (None, "system", "developer"):
            raise UserError(f"message {number} is {with_article(role)} turn behind {with_article(last)} turn; put it first: {more}")
        if role == "assistant" and last in (None, "system", "developer"):
            raise UserError(f"message {number} is the assistant's, and no user turn stands before it; {more}")
        if role == "tool" and last != "tool" and not (before or {}).get("tool_calls"):
            raise UserError(f"message {number} is a tool's result, and no tool call stands before it; {more}")
        if role == "user" and last == "user":
            raise UserError(f"messages {number - 1} and {number} are two user turns in a row; join them: {more}")
        if role == last == "assistant" and not (message.get("tool_calls") or before.get("tool_calls")):
            raise UserError(f"messages {number - 1} and {number} are two turns of the assistant in a row; join them: {more}")
        before = message


def learned(messages: Sequence[Mapping], loss: str) -> list[int]:
    """Indices of the messages with a loss.

    Raises:
        UserError: the item says that nothing is learned.
    """
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if loss == "last":
        return answers[-1:]
    if loss == "item":
        answers = [i for i in answers if all(bool(messages[i].get(flag, True)) for flag in _FLAGS)]
        if not answers:
            raise UserError("none of its answers is to be learned (train, weight); take the item out")
    return answers


def flagged(messages: Sequence[Mapping]) -> bool:
    """Does any message say itself whether it is learned?"""
    return any(flag in message for message in messages for flag in _FLAGS)


def rendered_form(messages: Sequence[Mapping], settings: DataSettings) -> dict[int, dict]:
    """{index of the message: turn as a template gets it}: without what is ours alone, the system text where the settings put it."""
    turns = {i: {k: v for k, v in m.items() if k not in _FLAGS} for i, m in enumerate(messages)}
    first = next((i for i, m in turns.items() if m["role"] == "user"), None)
    if settings.system_as == "system" or first is None:
        return turns
    texts = [m["content"] for m in turns.values() if m["role"] in ("system", "developer")]
    turns[first] = turns[first] | {"content": "\n\n".join([*texts, turns[first]["content"]])}
    return {i: m for i, m in turns.items() if m["role"] not in ("system", "developer")}


def asked(messages: Sequence[Mapping]) -> str:
    """A conversation up to its last answer, in plain words."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages[:last])


def odd(messages: Sequence[Mapping], settings: DataSettings) -> list[str]:
    """What is odd about a conversation that can be learned."""
    blank = [(n, m) for n, m in enumerate(messages, 1) if not (m["content"].strip() or m.get("tool_calls"))]
    notes = [f"message {n} ({m['role']}) is empty" for n, m in blank]
    if messages[-1]["role"] == "user":
        notes.append("ends with a user turn, which nothing answers")
    if flagged(messages) and settings.loss != "item":
        notes.append(f"says what is learned (train, weight), and loss is {settings.loss}; set loss: item")
    return notes
