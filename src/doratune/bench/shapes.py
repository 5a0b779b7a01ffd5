"""The model that is measured: a real one, or a Llama of a given shape with random weights, made on the device itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..support.models import load_model, quiet_loading, torch_dtype
from .clock import FAILED, attempt

SHAPES = {
    "llama-8b-shape": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama-7b-shape": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "llama-768-shape": {  # small enough that the host is a good part of a step; a small head, so that the layers are what is timed
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
    },
    "tiny-shape": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
    },
}

BESIDE = ("llama-768-shape",)
"""Shapes that reports show beside the main model, from files of their own."""


def load(name: str, dtype: str, device: torch.device, quantize: str = "none"):
    """The causal language model `name`, or of the shape `name`, in evaluation mode on `device`, its linear layers quantized.

    Raises:
        UserError: it cannot be found, read, or held in memory.
    """

    def make():
        if name in SHAPES:
            return shaped(name, dtype, device)
        model = load_model(name, dtype, quantize)
        return model.to(device) if quantize == "none" or device.type != "cpu" else model

    if name in SHAPES and quantize != "none":
        raise UserError(f"model {name} has random weights, made on the device; --quantize needs a real model")
    model = attempt(make, device)
    if model is FAILED:
        raise UserError(f"{name} does not fit into the memory of {device} in {dtype}; use a smaller --model, or --dtypes bfloat16")
    return model.eval()


def shaped(name: str, dtype: str, device: torch.device):
    """A Llama of the shape `name` with random weights, the same in every run on a device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[name], tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    with quiet_loading(), torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch_dtype(dtype))


def random_ids(model, rows: int, length: int) -> Tensor:
    """Token ids (rows, length), the same in every run."""
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    return ids.to(model.get_input_embeddings().weight.device)
