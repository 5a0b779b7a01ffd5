"""DataSettings: how the items of a data set are read and what of them is learned; `doratune train` and `doratune data` share them.

Words are the field's: LLaMA-Factory's `columns`, axolotl's and OpenAI's `train` and `weight` of a message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..support.values import choices
from .formats import names_of_formats


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How items become text, and where the loss falls."""

    data_format: str = choices("auto", ("auto", *names_of_formats()))
    """Format of the items: auto (by their keys, and said), instruction (alpaca), chat (messages), sharegpt (conversations),
    completion (prompt, completion), questions (question, answer), text, preference (chosen, rejected), or visual (messages or
    conversations with images)."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """A format's names of fields, and what the file calls them: {instruction: question, output: answer}."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Other names of roles in conversations: {bot: assistant}; a role mapped to itself is left to the template."""
    prompt: Literal["plain", "published", "template"] = "plain"
    """Of instruction and completion data: plain (Alpaca's prompt; the prompt as it is), template (the tokenizer's chat template),
    or published (the published scripts' training text; score with protocol paper)."""
    images: str | None = None
    """Folder that the names of images begin in; default: that of the data file."""
    loss: Literal["all", "last", "item"] = "all"
    """Of conversations: learn all answers, the last, or those that the items say (`train: true`, `weight: 1` of a message)."""
    turn_order: Literal["strict", "any"] = "strict"
    """Refuse conversations whose turns do not alternate, or leave the order to the template."""
    system_as: Literal["system", "user"] = "system"
    """Where a system text goes: its own turn, or in front of the first user turn, for templates without a system role."""
    special_tokens: Literal["refuse", "keep"] = "refuse"
    """What happens to an item whose words spell a special token of the tokenizer, such as `<|im_end|>`."""
