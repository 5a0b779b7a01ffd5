"""Images with masks as a model reads them, and its answer at a mask's size.

The model's image processor does to a mask what it does to the image – resizes, crops, pads – with the nearest pixel and without
scaling: class numbers go through it as an image whose channels spell number + 1, so that 0, with which it pads, is of no class.
Cost: decoding and preparing both files each time a row is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..data.encode import IGNORED
from ..data.masks import MaskedImage
from .image_rows import prepared

_AS_IT_IS = {"do_rescale": False, "do_normalize": False, "resample": 0}
"""Of an image processor: numbers stay, the nearest pixel is taken."""


class MaskRows(Dataset):
    """{pixel_values (C, H, W), labels (H, W)} of each image, IGNORED where a pixel is of no class."""

    def __init__(self, items: Sequence[MaskedImage], processor):
        self.items, self.processor = list(items), processor

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        item = self.items[index]
        image, numbers = item.open()
        pixels = prepared(image, item.place, self.processor)
        return {"pixel_values": pixels, "labels": prepared_mask(numbers, item.place, self.processor), "place": item.place}


def prepared_mask(numbers_HW: np.ndarray, place: str, processor) -> Tensor:
    """The class numbers as the processor leaves them, (H', W') as int64.

    Raises:
        UserError: its processor does not take an image of this size.
    """
    codes = np.where(numbers_HW == IGNORED, 0, numbers_HW + 1)
    low, high = (codes % 256).astype(np.uint8), (codes // 256).astype(np.uint8)
    low, high, _ = _coded(np.stack([low, high, low], -1), place, processor)  # the same from either end: some turn RGB to BGR
    codes = low + 256 * high
    return torch.where(codes == 0, IGNORED, codes - 1)


def is_whole(size_HW: tuple[int, int], place: str, processor) -> bool:
    """Does the processor leave a picture of this size whole: nothing cut off, nothing put around it?"""
    height, width = size_HW
    down, across = (np.linspace(1, 255, n).round().astype(np.uint8) if n > 1 else np.full(1, 1, np.uint8) for n in (height, width))
    picture = np.stack(np.broadcast_arrays(across[None], down[:, None], across[None]), -1)
    across, down, _ = _coded(np.ascontiguousarray(picture), place, processor)
    return all(
        int(ramp.min()) > 0 and (n == 1 or (ramp.min() <= 2 + 255 / steps and ramp.max() >= 254 - 255 / steps))
        for ramp, n, steps in ((across, width, across.shape[1]), (down, height, down.shape[0]))
    )


def _coded(picture_HWC: np.ndarray, place: str, processor) -> Tensor:
    """An image's numbers behind the processor, (3, H', W') as int64."""
    from PIL import Image

    return prepared(Image.fromarray(picture_HWC), place, processor, **_AS_IT_IS).round().long()


def answers_at(logits_CHW: Tensor, size_HW: tuple[int, int]) -> np.ndarray:
    """The most probable class of each pixel (H, W), logits between those of the model by bilinear interpolation.

    A class at a time: those of all classes at a photograph's size would not fit into memory."""
    best = answers = None
    for number, one in enumerate(logits_CHW.float()):
        there = F.interpolate(one[None, None], size=tuple(size_HW), mode="bilinear", align_corners=False)[0, 0]
        if best is None:
            best, answers = there, torch.zeros(there.shape, dtype=torch.long, device=there.device)
        else:
            answers[there > best] = number
            best = torch.maximum(best, there)
    return answers.cpu().numpy()


class PixelLoss:
    """Cross entropy of the pixels of an optimizer step at the masks' size, with that of an auxiliary head where a model has one.

    Models here take `num_items_in_batch` without using it, and the loss of accumulated batches would count as often as there are.
    An auxiliary head's output is in no model's output: it is taken where the head gives it, in training alone, and weighs as the
    model's config says."""

    def __init__(self):
        self.weight, self.auxiliary = 0.0, None

    def watch(self, model) -> None:
        """Take the outputs of the model's auxiliary head from now on; nothing where it has none."""
        if (head := getattr(model, "auxiliary_head", None)) is not None:
            self.weight = getattr(model.config, "auxiliary_loss_weight", 0.0)
            head.register_forward_hook(self._take)

    def _take(self, head, inputs, output) -> None:
        self.auxiliary = output if head.training and torch.is_grad_enabled() else None

    def __call__(self, outputs, labels, num_items_in_batch=None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        auxiliary, self.auxiliary = self.auxiliary, None
        count = (labels != IGNORED).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = _summed(logits, labels)
        if auxiliary is not None:
            loss = loss + self.weight * _summed(auxiliary, labels)
        return loss / count.clamp_min(1)


def _summed(logits_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    size = labels_BHW.shape[-2:]
    there = F.interpolate(logits_BCHW.float(), size=size, mode="bilinear", align_corners=False)
    return F.cross_entropy(there, labels_BHW, ignore_index=IGNORED, reduction="sum")
