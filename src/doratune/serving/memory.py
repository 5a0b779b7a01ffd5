"""Keys and values of rows that came at different times, as one cache: each row lies at the right, what is left of it is masked.

    width     S, the longest row's        mask (B, S)     1 where a row has a token        positions (B,)   of each row's next token

A row that joins is padded at the left to the width, or the others to its. When rows leave, the columns that nobody needs any more
go too. Every layer keeps all its keys, those with a sliding window too (the model masks them). Cost: a row that joins or leaves
copies the cache once, as each further token does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache


class Memory:
    """The cache of a batch."""

    def __init__(self, cache: DynamicCache | None = None, mask: Tensor | None = None):
        self.cache, self.mask = cache, mask

    def __len__(self) -> int:
        return 0 if self.mask is None else len(self.mask)

    @property
    def positions(self) -> Tensor:
        return self.mask.sum(1)

    def join(self, other: Memory) -> None:
        """Put another batch's rows behind these."""
        if not len(self):
            self.cache, self.mask = other.cache, other.mask
            return
        width = max(self.mask.shape[1], other.mask.shape[1])
        mask = torch.cat([_widened(one.mask, width, 1) for one in (self, other)])
        layers = zip(tensors(self.cache), tensors(other.cache), strict=True)
        cache = DynamicCache(
            [tuple(torch.cat([_widened(t, width, 2) for t in pair]) for pair in zip(one, two, strict=True)) for one, two in layers]
        )
        self.cache, self.mask = cache, mask

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        if len(rows) == len(self):
            return
        if not rows:
            self.cache = self.mask = None
            return
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        unused = int((mask.sum(0) > 0).int().argmax())
        self.mask = mask[:, unused:]
        self.cache = DynamicCache([tuple(t[index][:, :, unused:] for t in pair) for pair in tensors(self.cache)])

    def grow(self) -> None:
        """One more token in each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)


def tensors(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer, both (B, heads, S, size)."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def _widened(t: Tensor, width: int, dim: int) -> Tensor:
    missing = width - t.shape[dim]
    return F.pad(t, (*(0, 0) * (t.dim() - 1 - dim), missing, 0)) if missing else t
