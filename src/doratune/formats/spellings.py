"""Other spellings of a model's module names, which files have: the original Stable Diffusion's for a UNet of diffusers, and CLIP's
`text_model.`, which transformers 5 left out.

    down_blocks.b.resnets.l.conv1         input_blocks.{1 + b·(L + 1) + l}.0.in_layers.2       L = layers_per_block
    down_blocks.b.attentions.l.…          input_blocks.{1 + b·(L + 1) + l}.1.…
    down_blocks.b.downsamplers.0.conv     input_blocks.{1 + b·(L + 1) + L}.0.op
    up_blocks.b.…                         output_blocks.{b·(L + 1) + l}, its upsampler behind what else is in the last of a block

From the layout of the published checkpoints (`input_blocks`, `middle_block`, `output_blocks`), in which kohya trains SDXL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def spellings(names: Iterable[str], config) -> dict[str, str]:
    """Other spelling → module's name."""
    names = set(names)
    if getattr(config, "model_type", None) == "clip_text_model":
        return {f"text_model.{name}": name for name in names if not name.startswith("text_model.")}
    layers = _setting(config, "layers_per_block")
    if not isinstance(layers, int) or not any(name.startswith("down_blocks.") for name in names):
        return {}
    attentive = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    return {spelled: name for name in names if (spelled := _original(name, layers, attentive))}


def _original(name: str, layers: int, attentive: set[str]) -> str | None:
    """A module of diffusers' UNet as the original names it; None: it has no such name."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, number, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{2 * number + (kind == 'attentions')}.{_RESNET.get(rest, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if match is None:
        return None
    down, block, kind, number, rest = match[1] == "down", int(match[2]), match[3], int(match[4]), match[5]
    position = block * (layers + 1) + (number if kind in ("resnets", "attentions") else layers)
    place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + (match[2] in attentive)}[kind]
    if kind == "resnets":
        rest = _RESNET.get(rest, rest)
    elif kind == "downsamplers":
        rest = "op" if rest == "conv" else rest
    return f"{'input' if down else 'output'}_blocks.{position + down}.{place}.{rest}"


def _setting(config, name: str):
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)
