"""Image towers of transformers as makers of features: what a picture is turned into, cell by cell or as a whole.

    grid     (h · w, S) of one picture: the last hidden states without class and register tokens, or the last feature map
    whole    (S) of one picture: the model's own pooled output, if that is trained, else the mean of its grid

Any model that AutoModel loads and that takes `pixel_values`: CLIP, SigLIP, ViT, DINOv2, Swin, ConvNeXt, ResNet. Its fingerprint is
a digest of config, processor and every number. Cost: the model; the digest is a second a gigabyte.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError, listed
from .image_models import PROCESSOR
from .models import model_path, quiet_loading, readable_errors, source_settings

if TYPE_CHECKING:
    from PIL import Image

UNIMPORTANT = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Entries of a config that change no feature."""


class ImageTower:
    """A frozen image model with its processor, in fp32.

    Raises:
        UserError: it cannot be found or read, is no model of images, or lacks weights.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", trust_remote_code: bool = False):
        from transformers import AutoModel

        self.name, path = name, model_path(name)
        self.processor = _processor(name, path, trust_remote_code)
        with quiet_loading(), readable_errors(name):
            settings = source_settings(path, trust_remote_code)
            whole, info = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **settings)
        if lacking := sorted(key for key in info["missing_keys"] if "pooler" not in key):
            raise UserError(f"{name} lacks {listed(lacking, 3)}; its features would be random: copy or download it again")
        self.model = whole.to(device).eval().requires_grad_(False)
        self.inner: nn.Module = getattr(self.model, "vision_model", self.model)
        self.pools = not info["missing_keys"]  # a pooling layer that was drawn at random says nothing
        self.device = torch.device(device)
        self.fingerprint = _fingerprint(self.model, self.processor, self.pools)

    @torch.no_grad()
    def grid(self, pictures: Sequence[Image.Image], cells: int) -> Tensor:
        """(B, n, S) in fp32 on the CPU, n ≤ cells: the largest square of cells, the strongest of each pooled region."""
        side = math.isqrt(cells)
        maps = self._maps(self._pixels(pictures))
        height, width = (min(side, size) for size in maps.shape[-2:])
        return F.adaptive_max_pool2d(maps, (height, width)).flatten(2).transpose(1, 2).float().cpu()

    @torch.no_grad()
    def whole(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(B, S) in fp32 on the CPU."""
        pixels = self._pixels(pictures)
        pooled = getattr(self._outputs(pixels), "pooler_output", None) if self.pools else None
        return (self._maps(pixels).mean((-2, -1)) if pooled is None else pooled.flatten(1)).float().cpu()

    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(B, C, H, W) as the processor makes them."""
        try:
            prepared = self.processor(list(pictures), return_tensors="pt", input_data_format="channels_last")
            return prepared["pixel_values"].to(self.device, torch.float32)
        except Exception as error:  # a processor is a program of others
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(
                f"{self.name}: its image processor does not take these images ({reason}); set do_resize and size"
            ) from None

    def _maps(self, pixels: Tensor) -> Tensor:
        """(B, S, h, w) of (B, C, H, W)."""
        states = self._outputs(pixels).last_hidden_state
        if states.dim() == 4:
            return states
        height, width = self._grid_of(states.shape[1], pixels.shape[-2:])
        return states[:, states.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))

    def _outputs(self, pixels: Tensor):
        """The model's own.

        Raises:
            UserError: it takes no images, or has no hidden states.
        """
        try:
            outputs = self.inner(pixel_values=pixels)
            if outputs.last_hidden_state.dim() in (3, 4):
                return outputs
            reason = f"its last hidden state has {outputs.last_hidden_state.dim()} dimensions"
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
        raise UserError(f"{self.name} gives no features of an image ({reason}); give a CLIP, ViT, ResNet …")

    def _grid_of(self, tokens: int, size: Sequence[int]) -> tuple[int, int]:
        """(h, w) of the patches among so many tokens: by the patch size where that fits, else the largest square."""
        patch = getattr(self.inner.config, "patch_size", None)
        if isinstance(patch, int) and 0 < (size[0] // patch) * (size[1] // patch) <= tokens:
            return size[0] // patch, size[1] // patch
        side = math.isqrt(tokens)
        return side, side


def _processor(name: str, path: str, trust_remote_code: bool):
    """The model's image processor.

    Raises:
        UserError: it has none, or it cannot be read.
    """
    from transformers import AutoImageProcessor

    with quiet_loading(), readable_errors(name):
        try:
            return AutoImageProcessor.from_pretrained(path, backend="pil", **source_settings(path, trust_remote_code))
        except OSError as error:
            if PROCESSOR not in str(error):
                raise
            raise UserError(f"{name} has no {PROCESSOR}, which says how its images are prepared; give a model of images") from None


def _fingerprint(model: nn.Module, processor, pools: bool) -> str:
    """Digest of what makes the features."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in UNIMPORTANT}
    prepared = {key: value for key, value in processor.to_dict().items() if key not in UNIMPORTANT}
    digest = hashlib.sha256(json.dumps([config, prepared], sort_keys=True, default=str).encode())
    for name, t in sorted(model.state_dict().items()):
        if pools or "pooler" not in name:
            digest.update(name.encode())
            digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
