"""The evaluation loss as a mean over tokens: the same at every batch size and number of processes.

transformers averages the batches' means, so that a short answer in a batch of its own counts as much as a page. Here each example
gives the sum of its tokens' losses and their number; what distributed sampling repeats to fill the last batch is left out.
Cost: one cross entropy over the tokens with a label, an example at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.encode import IGNORED


class TokenLoss:
    """Sums of one evaluation, over all batches and processes."""

    def __init__(self):
        self.sum, self.count = 0.0, 0.0
        self.shift: int | None = None

    @torch.no_grad()
    def add(self, loss: Tensor, outputs, labels: Tensor | None, gather: Callable[[Tensor], Tensor]) -> None:
        """Count one batch.

        Args:
            loss: the batch's loss. outputs: the model's, or None. labels: (N, T) of tokens; any others are not counted.
            gather: brings (N, 2) together from all processes, without repeated examples.
        """
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return
        logits = outputs.get("logits") if isinstance(outputs, dict) else None
        parts = self._of_logits(loss, logits, labels)
        if parts is None:  # another loss than the tokens' cross entropy: a batch's own mean, spread over its tokens
            counts = (labels != IGNORED).sum(1).float()
            parts = torch.stack([loss.detach().float().mean() * counts, counts], 1)
        sums = gather(parts).double().sum(0) if parts.device.type != "mps" else gather(parts).cpu().double().sum(0)
        self.sum, self.count = self.sum + sums[0].item(), self.count + sums[1].item()

    def _of_logits(self, loss: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor | None:
        """(N, 2), each example's sum and count; None where the logits do not explain the loss. The first batch tells whether a
        position predicts its own label or the next one's."""
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


def _of_example(logits_TV: Tensor, labels_T: Tensor, shift: int) -> Tensor:
    """Sum of the losses of one example's tokens, and their number."""
    labels, logits = labels_T[shift:], logits_TV[: len(logits_TV) - shift]
    counted = labels != IGNORED
    return torch.stack([F.cross_entropy(logits[counted].float(), labels[counted], reduction="sum"), counted.sum().float()])
