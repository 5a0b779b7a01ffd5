"""Instruction data: `instruction`, optional `input`, `output`, in the Alpaca prompt of the paper's commonsense experiments.

One template serves training and evaluation, to the space: the published scripts differ between the two (published_prompts.py).
Prompt and answer are tokenized apart, so that the prompt's tokens are the same whether an answer follows or not.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UserError, kind_in_words
from .encode import Encoded

PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


def prompt_of(item: Mapping) -> str:
    """The text in front of the answer."""
    if item.get("input"):
        return f"{PAIRED}\n\n### Instruction:\n{item['instruction']}\n\n### Input:\n{item['input']}\n\n### Response:\n"
    return f"{PLAIN}\n\n### Instruction:\n{item['instruction']}\n\n### Response:\n"


def check(item: Mapping, where: str) -> None:
    """Raise for an item without a text `instruction` or `output`, or whose `input` is no text."""
    for key in ("instruction", "output"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise UserError(f"{where} has no text under {key!r}; every item needs instruction and output")
    if not isinstance(item.get("input") or "", str):
        raise UserError(f"{where} has {kind_in_words(item['input'])} under 'input'; expected text or nothing")


def encode(item: Mapping, tokenizer) -> Encoded:
    """Tokens of prompt and answer, the answer closed by the end-of-sequence token."""
    prompt = tokenizer(prompt_of(item))["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    answer = tokenizer(item["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer), len(prompt))
