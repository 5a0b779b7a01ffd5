"""Unmerged greedy decode: 64 new tokens after a prompt of 32, batch 1, with a key-value cache; every arm on the same prompt.

`merged` is our DoRA arm after `doratune.merge`: an ordinary model. Merging writes into the weights that all other arms
share, so this arm has its own copy of them.
"""

from __future__ import annotations

import copy
import functools
from contextlib import ExitStack

import torch
from torch import Tensor, nn

import doratune

from ..support.models import contiguous_head
from ..support.progress import Progress, silent
from .arms import build
from .clock import FAILED, interleave, prepare, summary
from .settings import BenchSettings
from .shapes import random_ids

PROMPT = 32
RATIOS = {"dora/lora": ("dora", "lora"), "dora_peft/dora": ("dora_peft", "dora"), "merged/frozen": ("merged", "frozen")}


def measure(base: nn.Module, settings: BenchSettings, label: str, progress: Progress = silent) -> dict:
    """{rank: {"arms": seconds of a whole decode, "ratios"}}."""
    return {str(rank): _one_rank(base, rank, settings, f"decode {label} rank {rank}", progress) for rank in settings.ranks}


def _one_rank(base: nn.Module, rank: int, settings: BenchSettings, label: str, progress) -> dict:
    prompt = random_ids(base, 1, PROMPT)
    arms = [name for name in settings.arms if name != "dora_dense"] + ["merged"] * ("dora" in settings.arms)
    models = prepare(arms, lambda name: decode_arm(name, base, settings.targets, rank).eval(), prompt.device)
    rounds = settings.few_rounds
    with ExitStack() as heads, progress(label, (settings.warm_up + rounds) * len(arms)) as advance:
        runs = {}
        for name, model in models.items():
            if model is not FAILED:
                heads.enter_context(contiguous_head(model))
                model = functools.partial(decode, model, prompt, settings.new_tokens)
            runs[name] = model
        return summary(interleave(runs, rounds, settings.warm_up, prompt.device, advance), RATIOS)


def decode_arm(name: str, base: nn.Module, targets: list[str], rank: int) -> nn.Module:
    """The model of an arm, `merged` among them."""
    if name != "merged":
        return build(name, base, targets, rank)
    model = build("dora", copy.deepcopy(base), targets, rank)
    doratune.merge(model, keep="none")
    return model


def decode(model: nn.Module, prompt: Tensor, new_tokens: int) -> Tensor:
    """ids (1, prompt + new_tokens): the end of sequence never ends it."""
    from transformers import GenerationConfig

    fixed = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0
    )
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=fixed)
