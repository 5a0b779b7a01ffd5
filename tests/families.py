"""Tiny models of transformers' families, each from its own default config made small: sizes by the names of the settings.

What these names mean is the same in nearly every family; `OWN` holds what a family needs besides. A class that cannot be made so
is named with the reason in docs/families.md, never left out.
"""

from __future__ import annotations

import contextlib
import copy

import torch

SETTINGS = {
    32: """hidden_size d_model n_embd dim embed_dim embedding_size emb_dim word_embed_proj_dim decoder_hidden_size
        encoder_hidden_size cross_attention_hidden_size attention_hidden_size rnn_hidden_size tmix_hidden_size encoder_hidden_dim
        hidden_dim proj_size projection_dim out_hidden_size output_dim d_latents image_size input_size img_size""",
    48: """intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner dim_feedforward feed_forward_dim feedforward_dim
        moe_intermediate_size shared_expert_intermediate_size decoder_intermediate_size ffn_hidden_size encoder_feedforward_dim
        mlp_dim classifier_proj_size moe_shared_expert_intermediate_size d_inner""",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth
        decoder_num_hidden_layers num_decoder_blocks encoder_num_hidden_layers num_key_value_heads num_kv_heads num_experts_per_tok
        moe_topk moe_k num_selected_experts num_conv_pos_embedding_groups""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads decoder_num_attention_heads
        num_encoder_attention_heads encoder_num_attention_heads decoder_num_heads num_experts num_local_experts n_routed_experts
        moe_num_experts num_frames""",
    8: """head_dim attention_head_size d_kv kv_channels patch_size patch_stride qk_rope_head_dim qk_nope_head_dim v_head_dim
        sliding_window attention_window state_size""",
    16: "q_lora_rank kv_lora_rank num_mel_bins num_conv_pos_embeddings",
    120: "vocab_size text_vocab_size decoder_vocab_size entity_vocab_size",
    64: "max_position_embeddings n_positions max_source_positions max_target_positions max_sequence_length",
    1: "n_groups n_group topk_group first_k_dense_replace",
    6: "num_latents num_queries",
    3: "num_labels",
}
WIDTHS = {name: size for size, names in SETTINGS.items() for name in names.split()}
OWN: dict[str, dict] = {
    "reformer": {"is_decoder": True},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "deepseek_v3": {"num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "minicpm3": {"num_key_value_heads": 4},
    "axk1": {"num_key_value_heads": 4},
    "mistral4": {"num_key_value_heads": 4},
    "codegen": {"rotary_dim": 4},
    "autoformer": {"prediction_length": 4, "context_length": 16},
    "informer": {"prediction_length": 4, "context_length": 16},
    "time_series_transformer": {"prediction_length": 4, "context_length": 16},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "swin": {"embed_dim": 24, "num_heads": [2, 2, 4, 4], "window_size": 2, "patch_size": 2},
    "donut-swin": {"embed_dim": 24, "num_heads": [2, 2, 4, 4], "window_size": 2, "patch_size": 2},
    "swinv2": {"embed_dim": 24, "num_heads": [2, 2, 4, 4], "window_size": 2, "patch_size": 2},
    "maskformer-swin": {"embed_dim": 24, "num_heads": [2, 2, 4, 4], "window_size": 2, "patch_size": 2},
    "bit": {"num_groups": 4},
    "esmc": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    "clvp": {"speech_config.n_embd": 32, "text_config.projection_dim": 32},
    "gemma3n": {"text_config.intermediate_size": 48},
    "gemma3n_text": {"intermediate_size": 48},
    "ministral": {"head_dim": 8},
}
"""family → settings that it needs besides small sizes."""

LISTED = {"conv_dim": 16, "hidden_sizes": None, "depths": 1, "layers_block_type": None, "tdnn_dim": 16, "encoder_hidden_sizes": 16}


def shrunk(config, own: dict | None = None):
    """A config of the same class with small sizes; own: settings that are taken as they are, `a.b` inside another config."""
    return type(config)(**_small(config.to_dict(), own or {}))


SKIPPED = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "id2label", "label2id")
STAGES = ("out_features", "out_indices", "stage_names")
"""Names of stages that a smaller backbone does not have."""


def _small(values: dict, own: dict) -> dict:
    layers = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(values.get(n), int)), 0)
    result = {}
    for name, value in values.items():
        if name in (*SKIPPED, *STAGES) or name.startswith("_"):
            continue
        if isinstance(value, list) and layers > 2 and len(value) == layers:
            kinds = list({str(kind): kind for kind in value}.values())[:2]
            result[name] = (kinds * 2)[:2]
            continue
        inner = {k.partition(".")[2]: v for k, v in own.items() if k.startswith(name + ".")}
        result[name] = _small_value(name, value, inner)
    for name, value in result.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= 100:
            result[name] = 100 + len(name) % 19
        elif name == "eos_token_id" and isinstance(value, list):
            result[name] = [2]
    return result | {k: v for k, v in own.items() if "." not in k}


def _small_value(name: str, value, own: dict):
    if isinstance(value, dict) and name == "per_layer_config":
        return {k: v for k, v in value.items() if int(k) < 2}
    if isinstance(value, dict) and name.endswith("config"):
        return _small(value, own) | ({"model_type": value["model_type"]} if "model_type" in value else {})
    if isinstance(value, dict) and "mrope_section" in value:
        return value | {"mrope_section": [2, 1, 1]}
    if isinstance(value, bool) or value is None or name not in WIDTHS | LISTED:
        return value
    if isinstance(value, int) and name in WIDTHS:
        return min(value, WIDTHS[name])
    if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
        small = LISTED.get(name) or WIDTHS.get(name)
        if name == "hidden_sizes":
            return type(value)(8 * 2**i for i in range(len(value)))
        return type(value)(min(v, small) for v in value) if small else value
    return value


LARGEST = 3_000_000
"""Parameters: beyond, a config did not become small."""


def tiny(class_name: str, own: dict | None = None, seed: int = 0):
    """A small model of a class of transformers with random weights, in evaluation mode.

    Raises:
        ValueError: its config did not become small.
    """
    import transformers

    cls = getattr(transformers, class_name)
    config = shrunk(cls.config_class(), own)
    size = 0
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):  # what some constructors cannot do there
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: its config has sizes under names of its own")
    torch.manual_seed(seed)
    return cls(config).eval()
