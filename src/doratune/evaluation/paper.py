"""Protocol `paper`: the published commonsense evaluation replayed: its prompt to the space, 4 beams, at most 32 new tokens.

What follows the last "### Response:" of prompt and output is searched for the first match of the task's pattern, as in the
DoRA authors' script. Different on purpose, so that the score is one of the model alone: an attention mask, explicit
end-of-sequence and padding tokens, and no setting of the checkpoint's generation config (docs/reproduce.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..data.published_prompts import evaluation_prompt
from ..errors import UserError
from .generate import generate

SETTINGS = {"beams": 4, "max_new_tokens": 32}


def paper(model, tokenizer, items: Sequence[dict], batch_size: int, done: Callable[[int], None]) -> list[dict]:
    """One record an item, in the items' order, as `generate`."""
    return generate(
        model, tokenizer, items, batch_size, done=done, prompt_of=evaluation_prompt, response_of=last_response, **SETTINGS
    )


def last_response(output: str) -> str:
    """The part of an output in which the published script looks for the answer."""
    return output.split("### Response:")[-1]


def check_fixed(**settings: int | None) -> None:
    """Raise for a setting that the protocol fixes to another value.

    Raises:
        UserError: the value that is set and the protocol's.
    """
    for name, value in settings.items():
        if value is not None and value != SETTINGS[name]:
            raise UserError(
                f"{name} is {value}, but protocol paper has {name} {SETTINGS[name]}; drop it, or use --protocol generate"
            )
