"""Loss and accuracy of an evaluation as means over tokens, or over pixels: the same at every batch size and number of processes.

transformers averages the batches' means, so that a short answer in a batch of its own counts as much as a page. Here each example
gives the sum of its tokens' losses, their number, and how many of them are the model's most probable ones; what distributed
sampling repeats to fill the last batch is left out.
Cost: one cross entropy over the tokens with a label, an example at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.encode import IGNORED


class TokenLoss:
    """Sums of one evaluation, over all batches and processes."""

    def __init__(self):
        self.sum, self.count, self.right = 0.0, 0.0, 0.0
        self.shift: int | None = None

    @torch.no_grad()
    def add(self, loss: Tensor, outputs, labels: Tensor | None, gather: Callable[[Tensor], Tensor]) -> None:
        """Count one batch.

        Args:
            loss: the batch's loss. outputs: the model's, or None. labels: (N, T) of tokens, (N, H, W) of pixels; no others count.
            gather: brings (N, 3) together from all processes, without repeated examples.
        """
        if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
            return
        labels = labels.flatten(1)
        logits = outputs.get("logits") if isinstance(outputs, dict) else None
        parts = self._of_logits(loss, logits, labels)
        if parts is None:  # another loss than the tokens' cross entropy: a batch's own mean, spread over its tokens
            counts = (labels != IGNORED).sum(1).float()
            parts = torch.stack([loss.detach().float().mean() * counts, counts, torch.full_like(counts, torch.nan)], 1)
        sums = gather(parts).double().sum(0) if parts.device.type != "mps" else gather(parts).cpu().double().sum(0)
        self.sum, self.count, self.right = (total + part for total, part in zip((self.sum, self.count, self.right), sums.tolist()))

    def _of_logits(self, loss: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor | None:
        """(N, 3), each example's sum, count and right tokens; None where the logits do not explain the loss. The first batch
        tells whether a position predicts its own label or the next one's."""
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != labels.shape:
            return None
        for shift in (1, 0) if self.shift is None else (self.shift,):
            parts = torch.stack([_of_example(one, label, shift) for one, label in zip(logits, labels)])
            mean = parts[:, 0].sum() / parts[:, 1].sum().clamp_min(1)
            if self.shift is not None or torch.isclose(mean, loss.detach().float().mean(), rtol=0.02, atol=1e-4):
                self.shift = shift
                return parts
        return None

    def mean(self) -> float | None:
        """The mean over tokens; None where no token was counted."""
        return self.sum / self.count if self.count else None

    def accuracy(self) -> float | None:
        """The share of tokens that are the most probable ones; None where no token was counted, or logits were not at hand."""
        return None if not self.count or math.isnan(self.right) else self.right / self.count


def _of_example(logits_TV: Tensor, labels_T: Tensor, shift: int) -> Tensor:
    """Sum of the losses of one example's tokens, their number, and how many have the largest logit."""
    labels, logits = labels_T[shift:], logits_TV[: len(logits_TV) - shift]
    counted = labels != IGNORED
    logits, labels = logits[counted].float(), labels[counted]
    right = (logits.argmax(-1) == labels).sum()
    return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), counted.sum().float(), right.float()])
