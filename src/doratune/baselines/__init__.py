"""The methods that the paper compares DoRA with besides LoRA: series adapter, parallel adapter, prefix tuning.

    series     y + s·up(act(down(y)))   after a linear layer (Houlsby et al., 2019)
    parallel   y + s·up(act(down(x)))   beside it (He et al., 2022)
    prefix     trained keys and values in front of every attention's own (Li & Liang, 2021)

Settings are those of LLM-Adapters (Hu et al., 2023), whose figures the paper quotes. None of them merges into the
weights, and the model must not be quantized.

    config.py       BaselineConfig: which baseline, how large, where
    attach.py       attach, detach, parameters, count
    layer.py        a module that a baseline was added to
    bottleneck.py   series and parallel adapters
    prefix.py       prefix tuning in front of every attention call
    folder.py       save and load
"""

from .attach import attach, attached, count, detach, parameters
from .config import BaselineConfig
from .folder import base_model_of, is_baseline, load, load_weights, save

__all__ = [
    "BaselineConfig",
    "attach",
    "attached",
    "base_model_of",
    "count",
    "detach",
    "is_baseline",
    "load",
    "load_weights",
    "parameters",
    "save",
]
