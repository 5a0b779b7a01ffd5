"""Figures of a segmentation over all pixels: IoU of each class, their mean, and the share of pixels that are right.

    IoU of a class    pixels that are of it and are called so / pixels that are of it or are called so
    mean IoU          over the classes that occur, in the masks or in the answers

Pixels that are of no class (IGNORED) count nowhere. All follows from three sums a class, which add up over images, so a figure does
not depend on batches. The sums come from scikit-learn's confusion matrix. Cost: one count of an image's pixels.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import confusion_matrix

from ..data.encode import IGNORED


def pixel_counts(gold_HW: np.ndarray, answers_HW: np.ndarray, classes: int) -> np.ndarray:
    """(3, C): pixels of each class that are called so, that are of it, that are called so wherever they are of any."""
    counted = gold_HW != IGNORED
    if not counted.any():
        return np.zeros((3, classes), np.int64)
    matrix = confusion_matrix(gold_HW[counted], answers_HW[counted], labels=np.arange(classes))
    return np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def iou_of(counts_3C: np.ndarray) -> np.ndarray:
    """(C) in float64, NaN of classes that do not occur."""
    right, gold, called = np.asarray(counts_3C, dtype=np.float64)
    either = gold + called - right
    return np.divide(right, either, out=np.full(len(right), np.nan), where=either > 0)


def mask_scores(counts_3C: np.ndarray) -> dict[str, float]:
    """mean_iou and pixel_accuracy; NaN where no pixel is of a class."""
    right, gold, _ = np.asarray(counts_3C, dtype=np.float64)
    if not gold.sum():
        return {"mean_iou": float("nan"), "pixel_accuracy": float("nan")}
    return {"mean_iou": float(np.nanmean(iou_of(counts_3C))), "pixel_accuracy": float(right.sum() / gold.sum())}
