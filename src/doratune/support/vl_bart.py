"""VL-BART (Cho 2021; Sung 2022; section 5.2 of the paper): BART that reads visual features in front of its text.

    h_BND = LayerNorm(F_BNS · W + b) + places[k] + images[j]     of cell or frame k of image j
    encoder input = [h_BND ; LayerNorm(tokens + positions)]      text positions count from 0, as in BART alone

The layers are transformers' BART; its config has one more entry, `visual` (`VisualInput`). The projection of a model that had none
is drawn. `attention_mask` covers both parts, (B, N + T), N first: the decoder looks at them by it. Cost: N more positions in the
encoder, and S · D + (P + J + 3) · D numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartEncoder

from ..errors import UserError, listed, with_article
from .models import model_path, one_dtype, quantization, quiet_loading, readable_errors, source_settings, torch_dtype

VISUAL = "model.encoder.visual"
"""Name of the module that is not BART's."""


@dataclass(frozen=True, kw_only=True)
class VisualInput:
    """What a VL-BART reads: the config's entry `visual`.

    Attributes:
        size: S, numbers of a feature. places: P, the most cells of an image or frames of a video. images: J, the most images.
        tower, fingerprint: the image tower that made the features, and what tells it from others.
        cells, frames, frame_rate: how an image and a video were turned into features (`data/visual_features/settings.py`).
    """

    size: int
    places: int
    images: int = 2
    tower: str = ""
    fingerprint: str = ""
    cells: int = 36
    frames: int = 64
    frame_rate: float = 3.0

    @classmethod
    def of(cls, config) -> VisualInput | None:
        """What a config says; None of a BART that reads text alone."""
        entry = getattr(config, "visual", None)
        if not isinstance(entry, Mapping):
            return None
        return cls(**{f.name: entry[f.name] for f in dataclasses.fields(cls) if f.name in entry})


class VisualEmbedding(nn.Module):
    """Features as the encoder's input: projected, normalized, with the place of each and the order of images."""

    def __init__(self, visual: VisualInput, width: int):
        super().__init__()
        self.project = nn.Linear(visual.size, width)
        self.norm = nn.LayerNorm(width)
        self.places = nn.Embedding(visual.places, width)
        self.images = nn.Embedding(visual.images, width)

    def forward(self, features_BNS: Tensor, places_BN2: Tensor) -> Tensor:
        """(B, N, D) of features and, for each, the number of its image and its place in it."""
        images, places = places_BN2.unbind(-1)
        projected = self.project(features_BNS.to(self.project.weight.dtype))
        return self.norm(projected) + self.places(places) + self.images(images)


class VLBartEncoder(BartEncoder):
    """BART's encoder with visual features in front of its text."""

    def __init__(self, config: BartConfig):
        super().__init__(config)
        visual = VisualInput.of(config)
        if visual is None:
            raise UserError("the config has no entry visual, so the size of the features is not known; load it by load_vl_bart")
        self.visual = VisualEmbedding(visual, config.d_model)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_places: Tensor | None = None,
        **_,
    ) -> BaseModelOutput:
        """Hidden states (B, N + T, D) of input_ids (B, T) behind visual_features (B, N, S) at visual_places (B, N, 2)."""
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.layernorm_embedding(embeds + self.embed_positions(embeds[:, :, -1]).to(embeds.device))
        if visual_features is not None:
            if visual_places is None:
                raise ValueError("visual_features come with visual_places: the number of the image and of the cell, each")
            hidden = torch.cat([self.visual(visual_features, visual_places).to(hidden.dtype), hidden], dim=1)
        hidden = nn.functional.dropout(hidden, p=self.dropout, training=self.training)
        mask = create_bidirectional_mask(self.config, hidden, attention_mask)
        for layer in self.layers:
            if not (self.training and self.layerdrop and torch.rand(()) < self.layerdrop):
                hidden = layer(hidden, mask)
        return BaseModelOutput(last_hidden_state=hidden)


class VLBartForConditionalGeneration(BartForConditionalGeneration):
    """BART whose encoder reads visual features too; without them it is BART."""

    def __init__(self, config: BartConfig):
        super().__init__(config)
        self.model.encoder = VLBartEncoder(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs=None,
        visual_features: Tensor | None = None,
        visual_places: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ):
        """As BART's; visual_features (B, N, S), visual_places (B, N, 2), attention_mask (B, N + T)."""
        if encoder_outputs is None:
            inputs = {"visual_features": visual_features, "visual_places": visual_places}
            inputs |= {"inputs_embeds": kwargs.pop("inputs_embeds", None)}
            encoder_outputs = self.model.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=encoder_outputs,
            labels=labels,
            **kwargs,
        )

    @property
    def visual_parts(self) -> tuple[str, ...]:
        """Modules between what is seen and the language model."""
        return (VISUAL,)


def is_vl_bart(class_name: str | None) -> bool:
    return class_name == VLBartForConditionalGeneration.__name__


def visual_input(name: str, trust_remote_code: bool = False) -> VisualInput | None:
    """What a model reads beside text; None of a BART that reads text alone.

    Raises:
        UserError: it cannot be read, or is no BART.
    """
    return VisualInput.of(_config(name, trust_remote_code))


def load_vl_bart(
    name: str,
    visual: VisualInput | None = None,
    dtype: str | torch.dtype = "float32",
    quantize: str | dict = "none",
    double_quantization: bool = False,
    trust_remote_code: bool = False,
    complete: bool = False,
) -> VLBartForConditionalGeneration:
    """The BART `name` with a visual embedding, in evaluation mode; that is drawn where the folder has none.

    Args:
        visual: what it will read; None: what the folder says.
        complete: refuse a folder without visual embedding too.

    Raises:
        UserError: it cannot be found or read, is no BART, reads other features, or lacks more than the visual embedding.
    """
    config, path = _config(name, trust_remote_code), model_path(name)
    own = VisualInput.of(config)
    visual = visual or own
    if visual is None:
        raise UserError(f"{name} reads text alone; train it on features first (objective: vl_bart)")
    if own is not None and (own.size != visual.size or own.places < visual.places or own.images < visual.images):
        raise UserError(
            f"{name} reads {own.places} features of {own.size} numbers, these are {visual.places} of {visual.size}; extract them "
            "as its own were, or begin with a BART that reads text alone"
        )
    if own is not None:
        visual = dataclasses.replace(visual, places=own.places, images=own.images)
    config.visual = dataclasses.asdict(visual)
    dtype = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    settings = quantization(quantize, dtype, double_quantization) | source_settings(path, trust_remote_code)
    if storage := settings.get("quantization_config"):
        storage.llm_int8_skip_modules = ["lm_head", VISUAL]
    with quiet_loading(), readable_errors(name):
        model, info = VLBartForConditionalGeneration.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, **settings
        )
    lacking = sorted(key for key in info["missing_keys"] if complete or own is not None or not key.startswith(f"{VISUAL}."))
    if lacking:
        raise UserError(f"{name} lacks {listed(lacking, 3)}; transformers would take random weights: copy or download it again")
    one_dtype(model, dtype)
    model.eval()
    model.name_or_path = model.config._name_or_path = name
    return model


def _config(name: str, trust_remote_code: bool) -> BartConfig:
    from transformers import AutoConfig

    path = model_path(name)
    with readable_errors(name):
        config = AutoConfig.from_pretrained(path, **source_settings(path, trust_remote_code))
    if not isinstance(config, BartConfig) or not config.is_encoder_decoder:
        kind = with_article(config.model_type)
        raise UserError(f"{name} is {kind}; give a BART with encoder and decoder, such as facebook/bart-base")
    return config
