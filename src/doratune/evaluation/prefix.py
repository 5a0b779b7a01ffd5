"""Beams of one prompt share its keys and values: they are computed once and copied to every beam.

transformers runs the whole prompt once a beam, which with 4 beams and at most 32 new tokens is most of the time.
"""

from __future__ import annotations

import inspect

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


def for_beams(model, ids: torch.Tensor, mask: torch.Tensor, beams: int) -> dict:
    """Arguments of model.generate that hold all of the prompts (N, T) but the last token, `beams` times.

    Empty for one beam, and for a model whose memory of the past is more than keys and values of all tokens."""
    accepted = inspect.signature(model.forward).parameters
    if beams == 1 or ids.shape[1] < 2 or "past_key_values" not in accepted:
        return {}
    arguments = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, :-1], "logits_to_keep": 1}
    extra = {name: value for name, value in arguments.items() if name in accepted}
    past = DynamicCache(config=model.config)
    if not past.layers or any(type(layer) is not DynamicLayer for layer in past.layers):
        return {}
    past = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=past, use_cache=True, **extra).past_key_values
    past.batch_repeat_interleave(beams)
    return {"past_key_values": past}
