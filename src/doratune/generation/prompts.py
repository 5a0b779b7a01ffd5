"""Prompts: from a file or a text, and what the model reads of each.

.txt      a prompt a line
.jsonl, .json   objects with `prompt`, `messages` (role, content) or `instruction` (and `input`)

chat          the tokenizer's chat template, ready for the assistant's turn
instruction   the prompt that instruction data is trained with
plain         the text as it is
auto          messages: chat; instruction: instruction; prompt: chat where the tokenizer has a template, else plain
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.files import read_examples
from ..data.instruction import prompt_of
from ..errors import UserError
from ..support.absent import no_file
from ..support.text import lines, read_text

TEMPLATES = ("auto", "chat", "instruction", "plain")
Item = Mapping


def read_prompts(path: Path) -> list[dict]:
    """The prompts of a file, in order.

    Raises:
        UserError: no such file, no prompts, an object without a prompt, with the item.
    """
    if path.suffix in (".json", ".jsonl"):
        items = read_examples(path)
        for number, item in enumerate(items, 1):
            if problem := _problem(item):
                raise UserError(f"{path}: item {number} {problem}")
        return items
    if not path.is_file():
        raise UserError(f"{path}: {no_file(path, 'file of prompts')}")
    try:
        text = read_text(path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    prompts = [{"prompt": line} for line in lines(text) if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts; expected one a line, or JSON lines in a file named .jsonl")
    return prompts


def _problem(item: Mapping) -> str | None:
    messages = item.get("messages")
    if messages is not None:
        good = (
            isinstance(messages, list)
            and messages
            and all(
                isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
            )
        )
        return None if good else "has no list of role and content under 'messages'"
    for key in ("prompt", "instruction"):
        if key in item:
            return None if isinstance(item[key], str) and item[key].strip() else f"has no text under {key!r}"
    return "has none of 'prompt', 'messages' and 'instruction'"


def rendered(item: Mapping, tokenizer, template: str = "auto", system: str | None = None) -> list[int]:
    """The token ids that the model reads.

    Raises:
        UserError: no chat template, a template that refuses these messages, or a form that the item cannot have.
    """
    kind = _kind(item, tokenizer, template)
    if kind == "chat":
        return _chat(conversation(item, system), tokenizer)
    if system is not None:
        raise UserError(f"system needs a chat template; drop it, or give --template chat (template is {kind})")
    if "messages" in item:
        raise UserError(f"template is {kind}, which is for one text; messages need --template chat")
    text = item.get("prompt", item.get("instruction"))
    if kind == "instruction":
        text = prompt_of({"instruction": text, "input": item.get("input")})
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def rendered_all(items: Sequence[Item], tokenizer, template: str = "auto", system: str | None = None) -> list[list[int]]:
    """`rendered` of each, with the number of the one that is wrong."""
    rows = []
    for number, item in enumerate(items, 1):
        try:
            rows.append(rendered(item, tokenizer, template, system))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
    return rows


def conversation(item: Mapping, system: str | None = None) -> list[dict]:
    """The messages of an item, a system prompt in front where it has none of its own."""
    if "messages" in item:
        messages = [dict(m) for m in item["messages"]]
    else:
        text = item.get("prompt", item.get("instruction"))
        messages = [{"role": "user", "content": f"{text}\n\n{item['input']}" if item.get("input") else text}]
    own = messages[0]["role"] == "system"
    return messages if system is None or own else [{"role": "system", "content": system}, *messages]


def _kind(item: Mapping, tokenizer, template: str) -> str:
    if template != "auto":
        return template
    if "messages" in item:
        return "chat"
    if "instruction" in item:
        return "instruction"
    return "chat" if tokenizer.chat_template else "plain"


def _chat(messages: list[dict], tokenizer) -> list[int]:
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; give --template instruction or plain")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, IndexError, KeyError) as error:
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"the chat template refuses a conversation of {roles}: {' '.join(str(error).split())[:200]}") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not getattr(tokenizer, "in_parts", False):
        return ids
    if tokenizer.mark in ids:
        raise UserError("a prompt with an image; prompts are text here: ask about images with doratune evaluate --task FILE.json")
    return [*tokenizer.leading(text), *ids]
