"""The class of each pixel: a pretrained image model of transformers with a head for masks, cross entropy at the masks' size.

Data are images with masks (`data/mask_sets.py`), both prepared by the model's own image processor. The classes are those that
`class_names` says, else those of the model's own head, else the numbers that occur; where they are the model's own, in order, its
head is kept. Cost: see `image_objective.py`; without names and head, decoding each mask once more.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ...data.loading import weighted
from ...data.mask_sets import load_masked
from ...data.masks import MaskedImage, MaskSettings, class_numbers, names_of_classes
from ...errors import UserError, listed
from ...support.fields import setting_names
from ...support.image_heads.segmentation import HEAD
from ..image_objective import ImageObjective


class SemanticSegmentation(ImageObjective):
    """One class for each pixel."""

    reads = (*ImageObjective.reads, *setting_names(MaskSettings))
    head = HEAD
    trains = "head of masks"

    def __init__(self, recipe):
        super().__init__(recipe)
        self.loss = None

    def check(self) -> None:
        super().check()
        names_of_classes(self.recipe.class_names)

    def read(self, sources, unusable, say):
        from .. import mask_scores  # noqa: F401 (scikit-learn: missed now, not after the first epoch)

        recipe, items = self.recipe, []
        for source, weight in zip(sources, recipe.data_weights or [1] * len(sources)):
            pairs = load_masked(source, "train", recipe.columns, unusable)
            for note in pairs.notes:
                say(note)
            items += weighted(pairs.items, weight, recipe.seed)
        items, own = [replace(item, reduced=recipe.reduce_labels) for item in items], self.own_labels()
        self.labels = names_of_classes(recipe.class_names) or own or occurring(items)
        head = "the model's own head, which has them" if self.labels == own else "a new head"
        say(f"{len(self.labels)} classes ({listed(self.labels, 5)}); {head}")
        return [replace(item, classes=len(self.labels)) for item in items]

    def held_out(self, source, unusable):
        return of_classes(load_masked(source, "val", self.recipe.columns, unusable).items, self.labels, self.recipe.reduce_labels)

    def report(self, items) -> str:
        return f"{len(items)} images with masks"

    def rows(self, items, processor):
        from ..mask_rows import MaskRows

        return MaskRows(items, processor)

    def load(self, dtype: str, quantize: str = "none", double_quantization: bool = False):
        model = super().load(dtype, quantize, double_quantization)
        model.config.reduce_labels = self.recipe.reduce_labels  # beside the labels: what the numbers of its masks mean
        return model

    def arranged(self, rows, model, processor, say):
        self._loss().watch(model)
        return rows

    def _loss(self):
        from ..mask_rows import PixelLoss

        self.loss = self.loss or PixelLoss()
        return self.loss

    def arguments(self) -> dict:
        return super().arguments() | {"batch_eval_metrics": True}

    def trainer_settings(self) -> dict:
        return {
            "compute_loss_func": self._loss(),
            "compute_metrics": _Figures(),
            "preprocess_logits_for_metrics": _counted,
        }


def of_classes(items: list[MaskedImage], labels: list[str], reduced: bool) -> list[MaskedImage]:
    """The images held against a model's classes: a number that it does not have is a problem of its mask."""
    return [replace(item, classes=len(labels), reduced=reduced) for item in items]


def occurring(items: list[MaskedImage]) -> list[str]:
    """The numbers in the masks as names of classes.

    Raises:
        UserError: fewer than two, or a gap among them: then something else than a class may be meant.
    """
    numbers = class_numbers(items)
    if len(numbers) < 2:
        only = f"the class number {min(numbers)} alone" if numbers else "no class number"
        raise UserError(
            f"the masks hold {only}, and segmentation needs two classes or more; 255 is of no class: write a figure as 1, not 255"
        )
    if missing := sorted(set(range(max(numbers) + 1)) - numbers):
        held, gap = listed(map(str, sorted(numbers)), 8), listed(map(str, missing), 3)
        raise UserError(
            f"the masks hold the class numbers {held}, but not {gap}; name all classes (class_names), or number those that occur "
            "from 0 on"
        )
    return [str(number) for number in sorted(numbers)]


def _counted(outputs, labels) -> torch.Tensor:
    """(N, 3, C) sums of a batch's pixels, in place of its logits: those of an evaluation would not fit into memory."""
    from ..mask_rows import answers_at
    from ..mask_scores import pixel_counts

    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    counts = [pixel_counts(gold.cpu().numpy(), answers_at(one, gold.shape), logits.shape[1]) for one, gold in zip(logits, labels)]
    return torch.from_numpy(np.stack(counts)).to(logits.device)


class _Figures:
    """mean_iou and pixel_accuracy of an evaluation, whose batches come one by one."""

    def __init__(self):
        self.counts = None

    def __call__(self, prediction, compute_result: bool) -> dict[str, float]:
        from ..mask_scores import mask_scores

        counts = np.asarray(torch.as_tensor(prediction.predictions).cpu()).sum(0)
        self.counts = counts if self.counts is None else self.counts + counts
        if not compute_result:
            return {}
        counts, self.counts = self.counts, None
        return mask_scores(counts)


OBJECTIVE = SemanticSegmentation
