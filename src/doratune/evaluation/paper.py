"""Protocol `paper`: the published evaluations replayed: their prompts to the space, their decoding, their reading of an output.

Commonsense: 4 beams, at most 32 new tokens, the first match of the task's pattern behind the last "### Response:" of prompt and
output, as in the DoRA authors' script. Arithmetic and Orca-Math: see `kinds/`. Different on purpose, so that the score is one of
the model alone: an attention mask, explicit end-of-sequence and padding tokens, and no setting of the checkpoint's generation
config (docs/reproduce.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import UserError
from .generate import generate
from .kinds import TaskKind, kind_of
from .kinds.commonsense import SETTINGS, last_response

__all__ = ["SETTINGS", "check_fixed", "last_response", "paper"]


def paper(model, tokenizer, items: Sequence[dict], batch_size: int, done: Callable[[int], None]) -> list[dict]:
    """One record an item, in the items' order, as `generate`; items of one kind share a batch."""
    records: list[dict] = [{}] * len(items)
    for kind in dict.fromkeys(kind_of(item) for item in items):
        places = [i for i, item in enumerate(items) if kind_of(item) is kind]
        settings = dict(kind.published.settings, prompt_of=kind.published.prompt, read=reader(kind))
        part = generate(model, tokenizer, [items[i] for i in places], batch_size, done=done, **settings)
        for i, record in zip(places, part, strict=True):
            records[i] = record
    return records


def reader(kind: TaskKind) -> Callable[[str, Mapping], tuple[str | None, bool]]:
    """(output, item) → (answer, right) as the published script of this kind has it."""
    published = kind.published

    def read(text: str, item: Mapping) -> tuple[str | None, bool]:
        answer = published.answer(published.response(text), item)
        return answer, published.right(answer, item)

    return read


def check_fixed(fixed: Mapping[str, int] = SETTINGS, **settings: int | None) -> None:
    """Raise for a setting that the protocol fixes to another value.

    Args:
        fixed: what the published script of the items' kind sets.

    Raises:
        UserError: the value that is set and the protocol's.
    """
    for name, value in settings.items():
        if value is not None and value != fixed[name]:
            raise UserError(f"{name} is {value}, but protocol paper has {name} {fixed[name]}; drop it, or use --protocol generate")
