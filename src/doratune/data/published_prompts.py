"""The prompts of the published commonsense scripts, to the space; only to replay them, since training and evaluation differ.

Both indent every line by 16 spaces, so that the text ends in 16 spaces; a line break within an instruction is not indented.
The differences are white space only: in training two spaces after "the request." and a line of 16 spaces between the
sections; in evaluation one space and an empty line. With an input it is one space in training and none in evaluation.
Prompt and answer are tokenized as one text in training, as published: the last of the 16 spaces then goes to the answer's
first token, while in evaluation all 16 stand before it.
"""

from __future__ import annotations

from collections.abc import Mapping

from .encode import Encoded
from .instruction import PAIRED, PLAIN

_INDENT = " " * 16


def training_prompt(item: Mapping) -> str:
    """The text in front of the answer that the published models were trained on."""
    opening = f"{PAIRED} " if item.get("input") else f"{PLAIN}  "
    return _sections(opening, _INDENT, item)


def evaluation_prompt(item: Mapping) -> str:
    """The text that the published evaluation gives to the model."""
    opening = PAIRED if item.get("input") else f"{PLAIN} "
    return _sections(opening, "", item)


def _sections(opening: str, between: str, item: Mapping) -> str:
    texts = {"Instruction": item["instruction"], "Input": item.get("input"), "Response": ""}
    sections = (f"{_INDENT}### {title}:\n{_INDENT}{text}" for title, text in texts.items() if text or title != "Input")
    return f"{opening}\n\n" + f"\n{between}\n".join(sections)


def encode(item: Mapping, tokenizer) -> Encoded:
    """Tokens of prompt and answer as one text, closed by the end-of-sequence token.

    As published, as many tokens are prompt as the prompt has by itself."""
    prompt = training_prompt(item)
    alone, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + item["output"])["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    start = min(len(alone) - (alone[-1] == tokenizer.eos_token_id), len(ids) - 1)
    return Encoded(ids, [False] * start + [True] * (len(ids) - start), start)
