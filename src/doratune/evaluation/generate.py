"""Protocol `generate`: the model writes, and the item's kind says what in the text is the answer (`kinds/`).

Left-padded with attention mask, sorted by length; greedy, or beam search. Greedy decoding stops a sequence as soon as nothing
that comes after can change the verdict: a commonsense answer is the first match, a number the last before a heading. What the
checkpoint's generation config says is left out: transformers fills every setting that a call leaves open from it, sampling and
penalties too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..errors import UserError
from . import prefix
from .images import image_inputs, place_of, prompt_tokens
from .kinds import TaskKind, kind_of
from .shrinking import write


@torch.no_grad()
def generate(
    model,
    tokenizer,
    items: Sequence[dict],
    batch_size: int,
    beams: int,
    max_new_tokens: int,
    done: Callable[[int], None],
    prompt_of: Callable[[Mapping], str] | None = None,
    read: Callable[[str, Mapping], tuple[str | None, bool]] | None = None,
) -> list[dict]:
    """One record an item, in the items' order: prompt, output, predicted answer, correct.

    Args:
        prompt_of: the text in front of the answer; default: as the item's kind asks.
        read: (output, item) → (its answer, whether that is right); default: as the item's kind reads, stopping early.
    """
    texts_of = prompt_of or (lambda item: kind_of(item).prompt(item))
    prompts = [prompt_tokens(tokenizer, prompt_of(i), i) if prompt_of else kind_of(i).tokens(i, tokenizer) for i in items]
    order = sorted(range(len(items)), key=lambda i: -len(prompts[i]))
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=getattr(tokenizer, "stops", tokenizer.eos_token_id),
        bos_token_id=tokenizer.bos_token_id,
    )
    stops_early = beams == 1 and read is None
    read = read or read_output
    records: list[dict] = [{}] * len(items)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = left_pad([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
        images = image_inputs(tokenizer, [items[i] for i in batch], ids)
        processors = LogitsProcessorList([NumbersOnly()])
        with only_these(model):
            if beams == 1:
                settled = AnswerFound(tokenizer, [items[i] for i in batch]) if stops_early else None
                rows = write(model, ids, mask, settings, processors, settled, images)
            else:
                more = images or prefix.for_beams(model, ids, mask, beams)
                given = {"input_ids": ids, "attention_mask": mask, "logits_processor": processors}
                rows = model.generate(**given, generation_config=settings, **more)[:, ids.shape[1] :]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        for i, text in zip(batch, texts):
            answer, right = read(text, items[i])
            record = record_of(items[i], texts_of(items[i]), text, answer, right)
            records[i] = record | ({"measures": m} if (m := kind_of(items[i]).measures(text, items[i])) else {})
        done(len(batch))
    return records


def record_of(item: Mapping, prompt: str, output: str, answer: str | None, right: bool) -> dict:
    """What is written of one item; `score` where an answer may count in part."""
    kind = kind_of(item)
    record = {"prompt": prompt, "output": output, "answer": answer, "gold": kind.gold(item), "correct": right}
    record |= {"image": place} if (place := place_of(item)) else {}
    return record if (score := kind.score(answer, item)) in (0, 1) else record | {"score": score}


def read_output(text: str, item: Mapping) -> tuple[str | None, bool]:
    """(the answer that an output gives to an item, whether it is right), as the item's kind says."""
    kind = kind_of(item)
    answer = kind.answer(kind.response(text), item)
    return answer, kind.right(answer, item)


@contextlib.contextmanager
def only_these(model):
    """Settings of a call to generate() are not filled up from the checkpoint's generation config."""
    config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config


class NumbersOnly(LogitsProcessor):
    """Stops a model whose scores are no numbers: it would write the same token for ever, and be scored."""

    def __call__(self, input_ids, scores):
        if torch.isnan(scores).any():
            raise UserError("the model's scores are NaN; try dtype float32, or train it again")
        return scores


class AnswerFound:
    """True for each row of a batch whose answer is settled, whatever it goes on with."""

    def __init__(self, tokenizer, items: list[dict]):
        self.tokenizer = tokenizer
        self.items: list[tuple[TaskKind, dict]] = [(kind_of(item), item) for item in items]
        self.has_answer = [False] * len(items)

    def __call__(self, new: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        for row, text in zip(rows, self.tokenizer.batch_decode(new, skip_special_tokens=True)):
            kind, item = self.items[row]
            self.has_answer[row] = self.has_answer[row] or kind.settled(text, item)
        return torch.tensor([self.has_answer[row] for row in rows])


def left_pad(rows: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)
