"""Protocol `likelihood`: which allowed answer does the model give the highest probability? No parsing, no format to learn.

Each choice is a continuation of the prompt ("the correct answer is X", or the choice itself in a task of one's own); its score is
the sum of its tokens' log-probabilities, and, with length normalization, that sum divided by the number of tokens. Choices that
share their tokens but the last share one forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch

from ..errors import UserError
from .generate import left_pad
from .images import image_inputs
from .kinds import kind_of
from .kinds.commonsense import CONTINUATION

__all__ = ["CONTINUATION", "continuation_tokens", "likelihood"]


@torch.no_grad()
def likelihood(model, tokenizer, items: Sequence[dict], batch_size: int, done: Callable[[int], None]) -> list[dict]:
    """One record an item, in the items' order: scores of all choices, best answer with and without normalization."""
    work, plans = [], []
    for index, item in enumerate(items):
        prompt, answers = kind_of(item).tokens(item, tokenizer), _continuations(item, tokenizer)
        stems = _maximal({tuple(a[:-1]) for a in answers})
        plans.append((answers, stems))
        work += [(index, stem, prompt + list(stem)) for stem in stems]
    work.sort(key=lambda entry: -len(entry[2]))
    scored: dict[tuple[int, tuple], torch.Tensor] = {}
    for start in range(0, len(work), batch_size):
        batch = work[start : start + batch_size]
        asked = [items[index] for index, _, _ in batch]
        for (index, stem, _), logits in zip(batch, _last_logits(model, tokenizer, batch, asked)):
            if not torch.isfinite(logits[-len(stem) - 1 :].amax(-1)).all():  # a single -inf is a choice of the model's own
                raise UserError(f"the model's scores of item {index + 1} are NaN or infinite; try dtype float32, or train it again")
            wanted = [a for a in plans[index][0] if tuple(a[:-1]) == stem[: len(a) - 1]]
            logp = logits[-len(stem) - 1 :].float().log_softmax(-1)
            for a in wanted:
                scored[index, tuple(a)] = logp[torch.arange(len(a)), torch.tensor(a, device=logp.device)].sum().cpu()
        done(len(batch) / max(1, len(work)) * len(items))
    return [_record(item, plans[i][0], [scored[i, tuple(a)].item() for a in plans[i][0]]) for i, item in enumerate(items)]


def continuation_tokens(items: Sequence[dict], tokenizer) -> int:
    """Tokens of the longest continuation of these items."""
    return max(len(answer) for item in items for answer in _continuations(item, tokenizer))


def _continuations(item: dict, tokenizer) -> list[list[int]]:
    kind = kind_of(item)
    return [tokenizer(kind.continuation(c), add_special_tokens=False)["input_ids"] for c in kind.choices(item)]


def _last_logits(model, tokenizer, batch, items: Sequence[dict]) -> torch.Tensor:
    """Logits of the positions that predict the continuation, (rows, longest stem + 1, vocabulary)."""
    ids, mask = left_pad([row for _, _, row in batch], tokenizer.pad_token_id, model.device)
    keep = max(len(stem) for _, stem, _ in batch) + 1
    accepted = inspect.signature(model.forward).parameters
    extra = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if "position_ids" in accepted else {}
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = torch.arange(ids.shape[1] - keep, ids.shape[1], device=ids.device)
    if images := image_inputs(tokenizer, items, ids):
        extra |= images
        if any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "base_model", None))):
            extra.pop("position_ids", None)  # it computes positions of its own from its images
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits[:, -keep:]


def _maximal(stems: set[tuple]) -> list[tuple]:
    """Stems that are no prefix of another: their forward pass covers the shorter ones."""
    return [s for s in sorted(stems) if not any(s != t and t[: len(s)] == s for t in stems)]


def _record(item: dict, answers: list[list[int]], sums: list[float]) -> dict:
    kind, gold = kind_of(item), kind_of(item).gold(item)
    offered = kind.choices(item)
    means = [total / len(a) for total, a in zip(sums, answers)]
    best = offered[max(range(len(sums)), key=sums.__getitem__)]
    best_normalized = offered[max(range(len(means)), key=means.__getitem__)]
    return {
        "prompt": kind.prompt(item),
        "output": kind.continuation(best),
        "answer": best,
        "answer_normalized": best_normalized,
        "gold": gold,
        "correct": best == gold,
        "correct_normalized": best_normalized == gold,
        "scores": dict(zip(offered, sums)),
    }
