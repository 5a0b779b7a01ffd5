"""Cost against size: one square layer of several sides, at several ranks.

A step's time over LoRA's and over the frozen layer's, the bytes that DoRA keeps for the backward pass beyond LoRA, and the
bytes of the adapter's own parameters.
"""

from __future__ import annotations

import torch

from ..support.models import torch_dtype
from ..support.progress import Progress, silent
from .arms import trainable
from .clock import FAILED, attempt, interleave, summary
from .layer import layer_steps
from .memory import saved_bytes
from .settings import BenchSettings

ARMS = ["frozen", "lora", "dora"]
RATIOS = {"dora/lora": ("dora", "lora"), "dora/frozen": ("dora", "frozen")}


def measure(settings: BenchSettings, progress: Progress = silent) -> dict:
    """{dtype: {rank: {side: {"arms", "ratios", "extra_bytes": DoRA − LoRA, "adapter_bytes"}}}}."""
    dtype, device = settings.dtypes[-1], settings.torch_device()
    rounds = settings.few_rounds
    result = {str(rank): {} for rank in settings.size_ranks}
    total = len(result) * len(settings.hidden_sizes) * (settings.warm_up + rounds) * len(ARMS)
    with progress(f"sizes {dtype}", total) as advance:
        for rank in settings.size_ranks:
            for size in settings.hidden_sizes:
                steps = layer_steps(ARMS, size, rank, settings.tokens, torch_dtype(dtype), device)
                one = summary(interleave(steps, rounds, settings.warm_up, device, advance), RATIOS)
                result[str(rank)][str(size)] = one | attempt_bytes(steps, device)
    return {dtype: result}


def attempt_bytes(steps: dict, device: torch.device) -> dict[str, int]:
    """Bytes kept beyond LoRA's, and of A, B and m; empty where there is no memory for it."""
    lora, dora = steps["lora"], steps["dora"]
    if FAILED in (lora, dora):
        return {}
    kept = attempt(lambda: [saved_bytes(step.forward, step.model) for step in (lora, dora)], device)
    if kept is FAILED:
        return {}
    return {"extra_bytes": kept[1] - kept[0], "adapter_bytes": sum(p.nbytes for p in trainable(dora.model))}
