"""Does the merged model say what base + adapter says? Logits on a few sentences, against the dtype's own floor.

Reference: base + adapter in fp32. The floor is the error of base + adapter in the result's dtype; merging is right when the merged
model's error is at most twice that. Three models are loaded one after the other.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..support.models import load_model, load_tokenizer
from .adapter import load

SENTENCES = (
    "The capital of France is",
    "Water boils when it is heated because",
    "def add(a, b):\n    return",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
)
FP32_FLOOR = 1e-5


@dataclass(frozen=True)
class Agreement:
    """Relative RMS errors of the logits, and the share of positions with the same most probable token."""

    merged_error: float
    unmerged_error: float
    merged_to_unmerged: float
    same_top_token: float

    @property
    def ok(self) -> bool:
        return self.merged_error <= 2 * self.unmerged_error + FP32_FLOOR

    def __str__(self) -> str:
        verdict = "agree to the dtype's floor" if self.ok else "DISAGREE beyond the dtype's floor"
        return (
            f"merged and unmerged logits {verdict}: relative difference {self.merged_to_unmerged:.2g}; against fp32 merged "
            f"{self.merged_error:.2g}, unmerged {self.unmerged_error:.2g}; same top token at {100 * self.same_top_token:.1f} % "
            "of positions"
        )


def agreement(base: str, adapter: str | Path, merged: str | Path, dtype: str) -> Agreement:
    """Compare the merged folder with base + adapter, all in `dtype`, and both with fp32.

    Raises:
        UserError: one of the three cannot be loaded.
    """
    tokenizer = load_tokenizer(base)
    ids = [tokenizer(sentence, return_tensors="pt")["input_ids"] for sentence in SENTENCES]
    reference = _logits(base, adapter, "float32", ids)
    unmerged = reference if dtype == "float32" else _logits(base, adapter, dtype, ids)
    result = _logits(str(merged), None, dtype, ids)
    return Agreement(
        merged_error=distance(result, reference),
        unmerged_error=distance(unmerged, reference),
        merged_to_unmerged=distance(result, unmerged),
        same_top_token=(result.argmax(-1) == unmerged.argmax(-1)).double().mean().item(),
    )


@torch.no_grad()
def _logits(model_name: str, adapter, dtype: str, ids: list[Tensor]) -> Tensor:
    model = load_model(model_name, dtype)
    if adapter is not None:
        load(model, adapter)
    logits = torch.cat([model(input_ids=row).logits[0].float() for row in ids])
    del model
    gc.collect()
    return logits


def distance(a: Tensor, b: Tensor) -> float:
    """Relative RMS difference."""
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()
