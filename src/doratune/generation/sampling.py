"""Settings of generation, and many prompts in batches.

What the checkpoint's generation config says is left out but for the tokens that end a text: a call says all. Prompts are left-
padded and sorted by length. Greedy (temperature 0) unless asked; sampled texts are the same for the same seed, prompts and batch
size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList

from ..errors import UserError
from ..evaluation.generate import left_pad, only_these
from ..evaluation.shrinking import write


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the most probable token; top_p: only the most probable tokens that make up this share.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a number above 0, up to 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; expected a whole number of at least 0")

    def config(self, model, tokenizer):
        """transformers' GenerationConfig."""
        from transformers import GenerationConfig

        sampled = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ends_of(model, tokenizer),
            **(sampled if self.temperature else {"do_sample": False}),
        )


def ends_of(model, tokenizer) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the checkpoint's generation config (the end of a turn)."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = more if isinstance(more, list) else [more]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *more] if i is not None))


def check_length(ids: Sequence[int], model, new: int, where: str) -> None:
    """Raise where prompt and answer do not fit into the model's positions."""
    most = getattr(model.config, "max_position_embeddings", None)
    if not ids:
        raise UserError(f"{where} has no tokens; give it some text")
    if most is not None and len(ids) + new > most:
        raise UserError(f"{where}: {len(ids)} tokens and {new} new ones are more than the model's {most}; lower --max_new_tokens")


def check_lengths(prompts: Sequence[Sequence[int]], model, new: int) -> None:
    """`check_length` of each, by its number."""
    for number, ids in enumerate(prompts, 1):
        check_length(ids, model, new, f"prompt {number}")


@dataclass(frozen=True)
class Answer:
    """A text; its number of tokens; whether it ended by itself (stop) or was cut (length)."""

    text: str
    tokens: int
    finish: str


@torch.no_grad()
def answers(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int = 8,
    done: Callable[[int], None] = lambda n: None,
) -> list[Answer]:
    """One answer a prompt, in their order.

    Raises:
        UserError: a prompt that does not fit into the model.
    """
    check_lengths(prompts, model, sampling.max_new_tokens)
    config = sampling.config(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    results: list[Answer | None] = [None] * len(prompts)
    torch.manual_seed(sampling.seed)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = left_pad([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
        with only_these(model):
            rows = write(model, ids, mask, config, LogitsProcessorList())
        for i, row in zip(batch, rows, strict=True):
            results[i] = _answer(row.tolist(), config.eos_token_id, tokenizer)
        done(len(batch))
    return results


def _answer(row: list[int], ends: list[int], tokenizer) -> Answer:
    end = next((place for place, token in enumerate(row) if token in ends), None)
    length = len(row) if end is None else end + 1
    return Answer(tokenizer.decode(row[:length], skip_special_tokens=True), length, "length" if end is None else "stop")
