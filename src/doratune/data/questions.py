"""Question data: `question` and worked `answer`, in the prompt of the published Orca-Math runs (§6.1, Answer.AI), to the space.

    ###Question:
    {question}
    ###Answer:
    {answer}

One prompt serves training and evaluation; prompt and answer are tokenized apart.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UserError
from .encode import Encoded


def prompt_of(item: Mapping) -> str:
    """The text in front of the answer."""
    return f"###Question:\n{item['question']}\n###Answer:\n"


def check(item: Mapping, where: str) -> None:
    """Raise for an item without a text `question` or `answer`."""
    for key in ("question", "answer"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise UserError(f"{where} has no text under {key!r}; every item needs question and answer")


def encode(item: Mapping, tokenizer) -> Encoded:
    """Tokens of prompt and answer, the answer closed by the end-of-sequence token."""
    prompt = tokenizer(prompt_of(item))["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    answer = tokenizer(item["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer), len(prompt))
