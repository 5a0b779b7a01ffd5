"""Conversations about images: LLaVA's JSON (`image`, `conversations` with `<image>` in the text), and `messages` with images.

    {"id": …, "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", …}]}
    {"messages": [{"role": "user", "content": "<image>Which is larger?<image>"}, …], "images": ["a.png", "b.png"]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "…"}]}, …]}

As many images as marks; items without any are learned too, as LLaVA's own mix has them. A mark stays where it stands in its
turn (LLaVA's script moves it to the front; most templates do as well). Everything else is as in `messages.py` and
`sharegpt.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import UserError
from .. import chat, conversation
from ..image_sources import ImageSource, folders_of, named_images, source_of
from . import DataFormat
from .messages import Messages
from .sharegpt import ShareGPT

_LISTS = {"messages": Messages(), "conversations": ShareGPT()}
_PARTS = ("image", "image_url")
"""Types of a part that is an image."""
_PLACES = ("image", "image_url", "url", "path", "bytes")


class Visual(DataFormat):
    name, aliases, rank = "visual", ("llava",), 15
    shown = "messages or conversations, image or images"
    keys = tuple((image, turns) for turns in _LISTS for image in ("image", "images"))
    optional = ("tools", "system")
    inner = ("role", "content", "tool_calls", "from", "value")
    takes = ("chat", "sharegpt")
    sees = True

    def recognizes(self, item: Mapping) -> bool:
        return super().recognizes(item) or any(
            isinstance(part, Mapping) and part.get("type") in _PARTS and any(part.get(place) for place in _PLACES)
            for key, names in _content_keys(item)
            for message in item[key]
            if isinstance(message, Mapping)
            for part in _list_of(message, names)
        )

    def conversation(self, item: Mapping, where: str, settings) -> tuple[list[dict], list]:
        """(messages with a mark in the text for each image, what names each image).

        Raises:
            UserError: no conversation; more marks than images, or fewer; a video.
        """
        if item.get("videos") or item.get("video"):
            raise UserError(f"{where} has a video; images alone are read: take the item out")
        key = next((name for name in _LISTS if name in item), None)
        if key is None:
            raise UserError(f"{where} has neither 'messages' nor 'conversations'")
        listed, values = named_images(item, where), []
        turns = conversation.parsed(item[key])
        if isinstance(turns, list):
            turns = [_marked(message, listed, values) if isinstance(message, Mapping) else message for message in turns]
        messages = _LISTS[key].conversation({**item, key: turns}, where, settings)
        marks = [message["content"].count(chat.MARK) for message in messages]
        if any(count and message["role"] == "assistant" for count, message in zip(marks, messages)):
            raise UserError(f"{where} has an {chat.MARK} in an answer; a model of this kind writes text alone: take the item out")
        images = [next(iter(value), None) or (listed.pop(0) if listed else None) for value in values]
        missing = sum(value is None for value in images)
        if missing or listed or sum(marks) != len(images):
            count = len(images) - missing + len(listed)
            raise UserError(f"{where} has {sum(marks)} {chat.MARK} marks and {count} images; mend it so that each has the other")
        return messages, images

    def check(self, item: Mapping, where: str, settings) -> None:
        messages, _ = self.conversation(item, where, settings)
        tools = conversation.tools_of(item.get("tools"), where)
        conversation.check_answers(messages, where)
        conversation.check_calls(messages, tools, where)

    def encode(self, item: Mapping, tokenizer, settings):
        messages, images = self.conversation(item, "it", settings)
        if images and not getattr(tokenizer, "in_parts", False):
            raise UserError(
                f"it has an image, and {tokenizer.name_or_path or 'the model'} reads text alone; take a model of images and text"
            )
        tools = conversation.tools_of(item.get("tools"), "it")
        return chat.encode(messages, tokenizer, settings, tools, images=_sources(images, item, settings))

    def sources(self, item: Mapping, settings) -> list[ImageSource]:
        messages, images = self.conversation(item, "it", settings)
        last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
        count = sum(message["content"].count(chat.MARK) for message in messages[:last])
        return _sources(images[:count], item, settings)

    def notes(self, item: Mapping, settings) -> list[str]:
        return conversation.odd(self.conversation(item, "it", settings)[0], settings)

    def question(self, item: Mapping, settings) -> str:
        messages, images = self.conversation(item, "it", settings)
        return "\n".join([conversation.asked(messages), *(str(image)[:200] for image in images)])

    def asking(self, text: str) -> dict:
        return _LISTS["messages"].asking(text)

    def gold(self, item: Mapping, settings) -> str:
        answers = [m for m in self.conversation(item, "it", settings)[0] if m["role"] == "assistant"]
        return answers[-1]["content"]


def _sources(images: Sequence, item: Mapping, settings) -> list[ImageSource]:
    folders = folders_of(settings.images, getattr(item, "source", ""))
    return [source_of(value, folders) for value in images]


def _content_keys(item: Mapping) -> list[tuple[str, tuple[str, ...]]]:
    return [(key, ("content", "value")) for key in _LISTS if isinstance(item.get(key), list)]


def _list_of(message: Mapping, names: Sequence[str]) -> list:
    return next((message[name] for name in names if isinstance(message.get(name), list)), [])


def _marked(message: Mapping, listed: list, values: list) -> dict:
    """The message with its content as text, a mark where an image was; the images that its parts name go into `values`, an empty
    place for each mark without one."""
    name = next((key for key in ("content", "value") if key in message), "content")
    content = message.get(name)
    if isinstance(content, str):
        values += [()] * content.count(chat.MARK)
        return dict(message)
    if not isinstance(content, list) or not any(isinstance(p, Mapping) and p.get("type") in _PARTS for p in content):
        return dict(message)
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") in _PARTS:
            own = next((part[key] for key in _PLACES if part.get(key)), None)
            values.append(() if own is None else (own,))
            texts.append({"type": "text", "text": chat.MARK})
        else:
            inner = part.get("text") if isinstance(part, Mapping) else None
            values += [()] * (inner.count(chat.MARK) if isinstance(inner, str) else 0)
            texts.append(part)
    return {**message, name: texts}


FORMATS = (Visual(),)
