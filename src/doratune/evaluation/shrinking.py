"""Text of a batch of which rows leave once they have ended, so that few long answers do not keep many short ones computing.

A call of transformers' generate() ends as soon as a quarter of its rows has ended; the others go on in the next call, with their
rows of the keys and values. Greedy tokens in float32 are those of one call. Cost: copying the rows that stay; at most a third of
what is computed is for rows that have ended. For a memory of the past other than keys and values (states), and beside images, one
call.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

PART = 4
"""A call ends once one in so many of its rows has ended."""

Settled = Callable[[Tensor, Sequence[int]], Tensor]
"""(new tokens (N, T), the rows' numbers in the batch) → (N,) is nothing that comes after of use?"""


class RowsEnded(StoppingCriteria):
    """`ended` (N,): rows with an end token, or settled. Stops all once enough have; before, those that are settled."""

    def __init__(self, rows: Sequence[int], prompt_length: int, ends: Tensor, settled: Settled | None, leave: bool):
        self.rows, self.prompt_length, self.ends, self.settled, self.leave = rows, prompt_length, ends, settled, leave
        self.ended = torch.zeros(len(rows), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        new = input_ids[:, self.prompt_length :]
        settled = torch.zeros(len(new), dtype=torch.bool, device=new.device)
        if self.settled is not None:
            settled = self.settled(new, self.rows).to(new.device)
        self.ended = settled | torch.isin(new, self.ends).any(1)
        return torch.ones_like(settled) if self.leave and PART * int(self.ended.sum()) >= len(new) else settled


def write(
    model,
    ids: Tensor,
    mask: Tensor,
    settings: GenerationConfig,
    processors: LogitsProcessorList,
    settled: Settled | None = None,
    beside: dict | None = None,
) -> list[Tensor]:
    """The new tokens of each row, without beams.

    Args:
        ids, mask: (N, T), padded on the left. beside: further arguments of the model's first pass, such as images: then one call.
    """
    length, total = ids.shape[1], settings.max_new_tokens
    ends = torch.tensor(_listed(settings.eos_token_id), dtype=torch.long, device=ids.device)
    texts: list[Tensor] = [ids[i, length:] for i in range(len(ids))]
    rows, past, leave = list(range(len(ids))), None, not beside and leaves(model)
    while rows:
        ended = RowsEnded(rows, length, ends, settled, leave and len(rows) > 1)
        here = copy.deepcopy(settings)
        here.max_new_tokens, here.return_dict_in_generate = total - (ids.shape[1] - length), True
        more = dict(beside or {}) if past is None else {"past_key_values": past}  # without either, the model reads all again
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=here, stopping_criteria=StoppingCriteriaList([ended]),
            logits_processor=processors, **more,
        )  # fmt: skip
        for row, tokens in zip(rows, out.sequences):
            texts[row] = tokens[length:]
        stay = [] if not leave or out.sequences.shape[1] - length >= total else (~ended.ended).nonzero()[:, 0].tolist()
        if stay:
            index = torch.tensor(stay, device=ids.device)
            past, ids = out.past_key_values, out.sequences[index]
            if hasattr(past, "batch_select_indices"):
                past.batch_select_indices(index)
            else:  # a class of a user's own
                past = None
            mask = torch.cat([mask[index], mask.new_ones(len(stay), ids.shape[1] - mask.shape[1])], 1)
        rows = [rows[i] for i in stay]
    return texts


def leaves(model) -> bool:
    """Is all that the model remembers of the past keys and values, of which rows can be taken?"""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    past = DynamicCache(config=model.config)
    return bool(past.layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in past.layers)


def _listed(ends: int | list[int] | None) -> list[int]:
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
