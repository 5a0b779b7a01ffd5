"""What llama.cpp computes for each model family that is written as GGUF: its metadata, its form of q, k and norms.

    Llama, Mistral   pairs of a rotated head stand side by side there, in halves here: rows of q and k change places
    Qwen 2, 3        as here; Qwen 3 normalizes q and k
    Gemma 2, 3       norms are written with their 1 added; soft caps, sliding windows and two rotary bases are metadata

Source: llama.cpp's public documentation of the format and the behaviour of its graphs (architectures by name, keys by the `gguf`
package). A setting that a graph does not know is refused: it would change the output. Cost: nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError, listed, with_article

Check = Callable[[object], str | None]


@dataclass(frozen=True)
class Family:
    """One architecture of GGUF.

    Args:
        architecture: its name there.
        activation: the only one that its graph has.
        halves_to_pairs: rows of q and k are reordered for its rotation.
        norm_shift: what is added to the weights of norms.
        windows: its layers alternate between a sliding window and full attention, every so many full; 0: no window.
        large: number of layers from which it divides q by the root of hidden size / heads, not of the head's size; 0: never.
    """

    architecture: str
    activation: str = "silu"
    halves_to_pairs: bool = False
    norm_shift: float = 0.0
    windows: int = 0
    large: int = 0
    biases: tuple[str, ...] = ()


FAMILIES = {
    "LlamaForCausalLM": Family("llama", halves_to_pairs=True, biases=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family("llama", halves_to_pairs=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Gemma2ForCausalLM": Family("gemma2", "gelu_pytorch_tanh", norm_shift=1.0, windows=2, large=46),
    "Gemma3ForCausalLM": Family("gemma3", "gelu_pytorch_tanh", norm_shift=1.0, windows=6, large=62),
}
ROTATIONS = ("default", "linear", "yarn", "llama3")


def family_of(config, where: str) -> Family:
    """The family of a model's configuration.

    Raises:
        UserError: an architecture or a setting that the graph in llama.cpp does not have.
    """
    names = list(getattr(config, "architectures", None) or [type(config).__name__])
    name = next((n for n in names if n in FAMILIES), None)
    if name is None:
        raise UserError(f"{where} is {with_article(listed(names))}; GGUF is written for {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if problem := _problem(config, family):
        raise UserError(f"{where}: {problem}, which llama.cpp does not compute for {name}; run it with transformers or vLLM")
    return family


def _problem(config, family: Family) -> str | None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    same = {"gelu_pytorch_tanh": ("gelu_pytorch_tanh", "gelu_new"), "silu": ("silu", "swish")}
    if activation not in same[family.activation]:
        return f"its activation is {activation}"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False) and name not in family.biases:
            return f"{name} is true"
    if (share := rotation(config).get("partial_rotary_factor")) not in (None, 1, 1.0):
        return f"partial_rotary_factor is {share}"
    turned = rotation(config)
    if (kind := turned.get("rope_type", "default")) not in ROTATIONS:
        return f"its rotary scaling is {kind}"
    if idle := [n for n in ("attention_factor", "mscale", "mscale_all_dim") if kind == "yarn" and turned.get(n) is not None]:
        return f"its yarn scaling sets {idle[0]}"
    return _attention_problem(config, family)


def _attention_problem(config, family: Family) -> str | None:
    """The scale of attention and the order of windows, which a graph with windows has built in."""
    if not family.windows:
        return None
    head, layers = config.head_dim, config.num_hidden_layers
    expected = config.hidden_size // config.num_attention_heads if layers == family.large else head
    if config.query_pre_attn_scalar != expected:
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {expected}"
    full = [kind == "full_attention" for kind in config.layer_types]
    if full != [(i + 1) % family.windows == 0 for i in range(layers)]:
        return f"its full attention is not on every {family.windows}th layer"
    if getattr(config, "attn_logit_softcapping", None) and family.architecture == "gemma3":
        return "attn_logit_softcapping is set"
    return None


def rotation(config, layers: str = "full_attention") -> dict:
    """rope_parameters, of the kind of layers where each has its own."""
    parameters = config.rope_parameters or {}
    return parameters.get(layers, parameters) or {}


def describe(writer, config, family: Family) -> list[str]:
    """Write the model's metadata; lines about what llama.cpp does otherwise."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    turned = rotation(config)
    writer.add_rope_freq_base(turned.get("rope_theta", 10000.0))
    _scaling(writer, turned, config)
    if not family.windows:
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        seen = f"llama.cpp has no sliding window here: the same text up to {window} tokens" if window else ""
        return [seen] if seen else []
    writer.add_sliding_window(config.sliding_window)
    if family.architecture == "gemma3":
        writer.add_rope_freq_base_swa(rotation(config, "sliding_attention").get("rope_theta", 10000.0))
    for add, name in (
        (writer.add_attn_logit_softcapping, "attn_logit_softcapping"),
        (writer.add_final_logit_softcapping, "final_logit_softcapping"),
    ):
        if cap := getattr(config, name, None):
            add(cap)
    return []


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _scaling(writer, turned: dict, config) -> None:
    import gguf

    kind = turned.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(getattr(gguf.RopeScalingType, kind.upper()))
        writer.add_rope_scaling_factor(turned["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(turned.get("original_max_position_embeddings") or config.max_position_embeddings)
        for name in ("beta_fast", "beta_slow"):
            if turned.get(name) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{name}")(turned[name])


def extra_tensors(config) -> dict[str, Tensor]:
    """Tensors that only GGUF has: by what Llama 3's scaling divides each rotary frequency, (head size / 2,)."""
    turned = rotation(config)
    if turned.get("rope_type") != "llama3":
        return {}
    size = head_size(config)
    frequency = turned.get("rope_theta", 10000.0) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = turned["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
    low, high, factor = turned["low_freq_factor"], turned["high_freq_factor"], turned["factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: left as it is
    return {"rope_freqs.weight": (1 / (share + (1 - share) / factor)).float()}


def as_stored(name: str, t: Tensor, config, family: Family) -> Tensor:
    """A tensor as llama.cpp's graph wants it, in fp32; `name` is the checkpoint's."""
    owner = name.rsplit(".", 2)[-2] if name.count(".") else ""
    t = t.float()
    if family.norm_shift and owner.endswith("norm"):
        t = t + family.norm_shift
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if family.halves_to_pairs and owner in heads:
        t = t.unflatten(0, (heads[owner], 2, -1)).transpose(1, 2).flatten(0, 2)
    return t.contiguous()
