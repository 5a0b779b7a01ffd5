"""The next token of each row: the most probable one, or one drawn with the row's own temperature, top_p and random numbers.

A row draws from a generator of its own, so that a seed gives the same answer whatever else is in the batch. transformers' own
warpers cut and scale the scores. Cost: one pass over the scores of greedy rows, a sort of those with top_p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper


class Chooser:
    """How one answer's tokens are chosen.

    Args:
        temperature: 0 takes the most probable token.
        seed: None draws another sequence each time.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None, device: torch.device | str = "cpu"):
        self.greedy = temperature < 1e-5  # the scores over less than that are no numbers
        self.warpers = [] if self.greedy else [TemperatureLogitsWarper(float(temperature))]
        if not self.greedy and top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(top_p)))
        self.generator = None
        if not self.greedy:
            self.generator = torch.Generator(device)
            self.generator.seed() if seed is None else self.generator.manual_seed(seed)

    def draw(self, scores_V: Tensor) -> int:
        scores_1V = scores_V[None]
        for warper in self.warpers:
            scores_1V = warper(None, scores_1V)
        return torch.multinomial(scores_1V.softmax(-1), 1, generator=self.generator).item()


def next_tokens(scores_BV: Tensor, choosers: Sequence[Chooser]) -> list[int | None]:
    """One token a row; None where the scores are no numbers."""
    scores_BV = scores_BV.float()
    best, sound = scores_BV.argmax(-1).tolist(), (~scores_BV.isnan().any(-1)).tolist()
    return [
        None if not good else token if chooser.greedy else chooser.draw(scores)
        for scores, token, good, chooser in zip(scores_BV, best, sound, choosers, strict=True)
    ]
