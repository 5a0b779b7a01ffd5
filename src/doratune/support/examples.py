"""An input for a model, made from its config and the arguments of its forward: for checks that have to run a model nobody gave
an example for.

    ids             of its vocabulary, without special ones; the last is the end of the sequence (some classifiers look for it)
    images, audio   standard normal numbers in the sizes that the config names
    a mask, …       only where the forward cannot do without

`candidates` lists what may do, the smallest first: no config says all that a forward asks for, so a caller tries one after the
other. The text alone reaches no image encoder: what was not run is the caller's to say. Cost: one short input.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .model_folders import embeddings_of

BATCH, TOKENS = 1, 9


class _Facts:
    """What a config says, in itself and in the configs inside it."""

    def __init__(self, model: nn.Module):
        self.model, self.config = model, getattr(model, "config", None)
        self.configs = list(_inner(self.config))
        floats = [p for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1]
        self.dtype = floats[0].dtype if floats else torch.float32
        devices = (p.device for p in model.parameters() if not p.is_meta)  # on which an offloaded model has nothing between calls
        self.device = next(devices, _execution_device(model))
        self.generator = torch.Generator().manual_seed(0)

    def get(self, *names: str, default=None) -> Any:
        """The first of these settings that any of the configs has."""
        for name in names:
            for config in self.configs:
                if (value := _item(config, name)) is not None:
                    return value
        return default

    def whole(self, *names: str, default: int | None = None) -> int | None:
        value = self.get(*names, default=default)
        value = next(iter(value.values()), None) if isinstance(value, dict) else value
        value = value[0] if isinstance(value, list | tuple) and value else value
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def image_size(self) -> tuple[int, int]:
        size = self.get("image_size", "input_size", "img_size", "sample_size", default=32)
        if isinstance(size, dict):
            size = [size.get("height", 32), size.get("width", 32)]
        height, width = (size[-2:] if len(size) > 1 else size * 2) if isinstance(size, list | tuple) else (size, size)
        return int(height), int(width)


def _inner(config, depth: int = 0) -> Iterator[Any]:
    """A config and those inside it, the outer first."""
    if config is None or depth > 3:
        return
    yield config
    values = vars(config) if hasattr(config, "__dict__") else config if isinstance(config, dict) else {}
    for value in list(values.values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _inner(value, depth + 1)


def _item(config, name: str):
    if isinstance(config, dict):
        return config.get(name)
    try:
        return getattr(config, name, None)
    except Exception:  # some configs compute attributes that others lack
        return None


def _execution_device(model: nn.Module):
    """Where accelerate runs a model that it offloads."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    return next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), torch.device("cpu"))


def _ids(facts: _Facts, embedding=None) -> Tensor:
    """(B, T) ids below the vocabulary's end, none of them special but the last."""
    embedding = embedding if embedding is not None else embeddings_of(facts.model)
    size = getattr(embedding, "num_embeddings", None) or facts.whole("vocab_size", default=100)
    special = {value for config in facts.configs for value in _special(config)}
    usable = [i for i in range(min(size, 1000)) if i not in special] or list(range(min(size, 1000)))
    chosen = torch.randint(len(usable), (BATCH, TOKENS), generator=facts.generator)
    ids = torch.tensor(usable)[chosen]
    end = facts.whole("eos_token_id")
    if end is not None and 0 <= end < size:
        ids[:, -1] = end
    return ids.to(facts.device)


def _special(config) -> Iterator[int]:
    values = vars(config) if hasattr(config, "__dict__") else {}
    for name, value in values.items():
        if name.endswith(("token_id", "token_index")):
            yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))


def _pixels(facts: _Facts) -> Tensor:
    channels, size = facts.whole("num_channels", "in_channels", "in_chans", default=3), facts.image_size()
    frames = facts.whole("num_frames") if facts.get("tubelet_size", "num_frames") is not None else None
    return facts.numbers(BATCH, *([frames] if frames else []), channels, *size)


def _wave(facts: _Facts) -> Tensor:
    """(B, samples) for a stack of convolutions, (B, frames, bins) for a spectrogram."""
    strides, kernels = facts.get("conv_stride"), facts.get("conv_kernel")
    if isinstance(strides, list | tuple) and isinstance(kernels, list | tuple):
        length = 12
        for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
            length = (length - 1) * stride + kernel
        return facts.numbers(BATCH, length)
    if bins := facts.whole("num_mel_bins"):
        return facts.numbers(BATCH, facts.whole("max_length", "spectrogram_length", default=64), bins)
    channels = facts.whole("audio_channels")
    return facts.numbers(BATCH, *([channels] if channels else []), 16 * math.prod(facts.get("upsampling_ratios", default=[40])))


def _features(facts: _Facts) -> Tensor:
    """Mel features (B, bins, frames) as Whisper takes them, else (B, frames, bins)."""
    bins = facts.whole("num_mel_bins", "feature_size", "input_dim", "feature_projection_input_dim")
    if facts.whole("max_source_positions") and facts.whole("num_mel_bins"):
        return facts.numbers(BATCH, bins, 2 * facts.whole("max_source_positions"))
    per = facts.whole("input_feat_per_channel")
    bins = per * facts.whole("input_channels", default=1) if per else bins
    if facts.whole("spec_size"):  # an image of the spectrogram
        return facts.numbers(BATCH, 1, facts.whole("spec_size") * 4, facts.whole("num_mel_bins", default=64))
    return facts.numbers(BATCH, 40, bins or 80)


def _boxes(facts: _Facts) -> Tensor:
    top = min(facts.whole("max_2d_position_embeddings", default=100) - 1, 100)
    corner = torch.randint(top // 2, (BATCH, TOKENS, 2), generator=facts.generator)
    return torch.cat([corner, corner + top // 2], -1).to(facts.device)


def _text_states(facts: _Facts) -> Tensor:
    """What a diffusion model takes from its text encoder."""
    width = facts.whole("cross_attention_dim", "joint_attention_dim", "caption_channels", "encoder_hid_dim", "text_dim", default=32)
    return facts.numbers(BATCH, TOKENS, width)


def _latents(facts: _Facts) -> Tensor:
    return facts.numbers(BATCH, facts.whole("in_channels", default=4), *facts.image_size())


def _second_ids(facts: _Facts) -> Tensor:
    return _ids(facts)


MAKERS = {
    "input_ids": _ids,
    "decoder_input_ids": _second_ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_values": _wave,
    "input_features": _features,
    "bbox": _boxes,
    "sample": _latents,
    "hidden_states": _latents,
    "encoder_hidden_states": _text_states,
    "timestep": lambda facts: torch.full((BATCH,), 3, device=facts.device),
    "pooled_projections": lambda facts: facts.numbers(BATCH, facts.whole("pooled_projection_dim", default=32)),
    "class_labels": lambda facts: torch.zeros(BATCH, dtype=torch.long, device=facts.device),
    "attention_mask": lambda facts: torch.ones(BATCH, TOKENS, dtype=torch.long, device=facts.device),
    "past_values": lambda facts: facts.numbers(
        BATCH, facts.whole("context_length", "seq_length", default=32), facts.whole("num_input_channels", default=1)
    ),
}
"""Argument of a forward → what makes it."""

OPTIONAL = ("encoder_hidden_states", "class_labels", "attention_mask", "hidden_states", "timestep")
"""Only where the forward has no default for it."""


def candidates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keyword arguments that the model's forward may take, the smallest first; none where nothing is known of it."""
    try:
        arguments = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return
    if getattr(model, "config", None) is None:
        return
    needed = [name for name, p in arguments.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", None)
    main = main if main in arguments else next((name for name in arguments if name in MAKERS), None)
    encodes = bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in arguments
    small = [*dict.fromkeys(needed + ([main] if main else []) + (["decoder_input_ids"] if encodes else []))]
    most = [name for name in arguments if name in MAKERS and (name in small or name not in OPTIONAL)]
    bboxed = small + [name for name in ("bbox",) if name in arguments and name not in small]
    seen = []
    for names in (small, bboxed, most):
        if names and names not in seen and all(name in MAKERS for name in names):
            seen.append(names)
            yield from _filled(model, names)


def _filled(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    facts = _Facts(model)
    try:
        yield {name: MAKERS[name](facts) for name in names}
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError):  # a config whose settings mean something else
        return


def flat_tensors(output) -> list[Tensor]:
    """Every tensor of a model's output, in its order."""
    if torch.is_tensor(output):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [t for value in values for t in flat_tensors(value)]
