"""Classes of pixels: the most probable class of each, and the IoU of each class over all pixels of a task (`mask_scores.py`).

    results.json               mean_iou, pixel_accuracy, iou (of each class), accuracy (the mean over images of an image's mean IoU)
                               with standard error, right (images whose mean IoU is above one half) of total, majority
    TASK.likelihood.jsonl      an image a line: the shares of its classes, those of the answer, `score`, its mean IoU
    TASK/N.png                 image, mask and answer beside one another, of the first PANELS images

A task is a source of images with masks (`data/mask_sets.py`). The answer is the model's logits at the mask's own size, by bilinear
interpolation, as transformers' processors do it; where the image processor cuts or pads the image, at the size it leaves. In
float32 the score does not depend on the batch size but for pixels on which two classes agree to rounding. Cost: one forward an
image, the interpolation, scikit-learn's count of the pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ...data.encode import IGNORED
from ...data.image_sets import usable
from ...data.mask_sets import load_masked
from ...data.masks import MaskedImage
from ...errors import UserError
from ...support.image_heads.segmentation import HEAD
from ...support.image_models import labels_of
from ...support.tables import aligned
from ...training.image_rows import ImageCollator, dtype_of, prepared, refuse_unfit
from ...training.mask_rows import MaskRows, answers_at, is_whole, prepared_mask
from ...training.mask_scores import iou_of, mask_scores, pixel_counts
from ...training.objectives.semantic_segmentation import of_classes
from .images import PROTOCOL, ImageScorer

HALF = 0.5
"""An image's mean IoU above which it counts as right."""
PANELS = 100
"""Images that are drawn with mask and answer."""
SHOWN_CLASSES = 20
"""The most classes of which a table shows the IoU."""


class MaskScorer(ImageScorer):
    objective = "semantic_segmentation"
    head = HEAD

    def look(self, source: str, settings) -> None:
        load_masked(source, "test", settings.columns, [])

    def read(self, source: str, model, processor, limit: int | None, settings, unusable: list[str] | None) -> list[MaskedImage]:
        reduced = settings.reduce_labels
        if reduced is None:
            reduced = getattr(model.config, "reduce_labels", getattr(processor, "do_reduce_labels", False))
        pairs = load_masked(source, "test", settings.columns, unusable).items[:limit]
        items = usable(of_classes(pairs, labels_of(model.config), bool(reduced)), unusable)
        if not items:
            raise UserError(f"{source} holds no image that can be used; the first: {(unusable or ['none'])[0]}")
        return items

    def score(self, model, processor, name: str, items: list, batch_size: int, folder: Path, progress) -> tuple[dict, list]:
        labels = labels_of(model.config)
        started, counts, records = time.perf_counter(), [], []
        with progress(name, len(items)) as advance:
            for item, gold, answers in segmented(model, processor, items, batch_size):
                sums = pixel_counts(gold, answers, len(labels))
                counts.append(sums)
                records.append(_record(item.name, sums, labels))
                if len(records) <= PANELS:
                    records[-1]["image"] = _drawn(folder, f"{name}/{len(records)}.png", item, gold, answers)
                advance(1)
        return _figures(name, np.stack(counts), records, labels, time.perf_counter() - started), records

    def show(self, summary: dict) -> str:
        head = ["task", "images", "mean IoU", "pixel accuracy", "mean IoU of an image", "majority", "s", "images/s"]
        rows, below = [], []
        for r in summary["results"]:
            shares = [f"{100 * r[key]:.1f} %" for key in ("mean_iou", "pixel_accuracy")]
            of_images = f"{100 * r['accuracy']:.1f} ± {100 * r['standard_error']:.1f} %"
            speed = [f"{r['seconds']:.0f}", f"{r['items_per_second']:.1f}"]
            rows.append([r["task"], str(r["total"]), *shares, of_images, f"{100 * r['majority']:.1f} %", *speed])
            known = [f"{label} {100 * share:.1f} %" for label, share in r["iou"].items() if share is not None]
            more = f", {len(known) - SHOWN_CLASSES} more in results.json" if len(known) > SHOWN_CLASSES else ""
            below.append(f"{r['task']}: IoU of {', '.join(known[:SHOWN_CLASSES])}{more}")
        return "\n".join([*aligned(head, rows), *below, f"peak memory {summary['peak_bytes'] / 2**30:.2f} GiB"])


@torch.no_grad()
def segmented(model, processor, items: list[MaskedImage], batch_size: int) -> Iterator[tuple[MaskedImage, np.ndarray, np.ndarray]]:
    """(item, class numbers (H, W), the model's), in order.

    Raises:
        UserError: the model does not take the images, or what it says of one is NaN or infinite.
    """
    collate = ImageCollator(dtype_of(model), str(model.name_or_path))
    refuse_unfit(model, MaskRows(items[:1], processor)[0], collate, str(model.name_or_path))
    whole: dict[tuple[int, int], bool] = {}
    for start in range(0, len(items), batch_size):
        batch, golds = items[start : start + batch_size], []
        rows = []
        for item in batch:
            image, numbers = item.open()
            if (size := numbers.shape) not in whole:
                whole[size] = is_whole(size, item.place, processor)
            golds.append(numbers if whole[size] else prepared_mask(numbers, item.place, processor).numpy())
            rows.append({"pixel_values": prepared(image, item.place, processor), "labels": 0, "place": item.place})
        logits = model(pixel_values=collate(rows)["pixel_values"].to(model.device)).logits
        for item, gold, one in zip(batch, golds, logits):
            if not torch.isfinite(one).all():
                raise UserError(f"the model's scores of {item.place} are NaN or infinite; try dtype float32, or train it again")
            yield item, gold, answers_at(one, gold.shape)


def _record(name: str, sums_3C: np.ndarray, labels: list[str]) -> dict:
    """One image's line."""
    _, gold, called = sums_3C
    score = mask_scores(sums_3C)["mean_iou"]
    score = 0.0 if math.isnan(score) else score  # nothing but ignored pixels within what the processor leaves
    answer = _composed(called, labels)
    return {"prompt": name, "gold": _composed(gold, labels), "output": answer, "answer": answer} | {
        "correct": score > HALF,
        "score": score,
    }


def _composed(pixels_C: np.ndarray, labels: list[str]) -> str:
    """The shares of the classes, the largest first."""
    order = [c for c in np.argsort(-pixels_C, kind="stable") if pixels_C[c]]
    parts = [f"{labels[c]} {100 * pixels_C[c] / pixels_C.sum():.1f} %" for c in order[:8]]
    return ", ".join(parts + (["…"] if len(order) > 8 else [])) or "nothing"


def _figures(name: str, counts_N3C: np.ndarray, records: list[dict], labels: list[str], seconds: float) -> dict:
    """The figures of one task."""
    total, n = counts_N3C.sum(0), len(records)
    scores = np.array([record["score"] for record in records])
    shares = iou_of(total)
    return {
        "task": name, "protocol": PROTOCOL, "right": sum(record["correct"] for record in records), "total": n,
        "accuracy": float(scores.mean()), "standard_error": float(scores.std() / math.sqrt(n)), "unparsable": 0.0,
        **mask_scores(total), "iou": {label: None if math.isnan(x) else float(x) for label, x in zip(labels, shares)},
        "pixels": int(total[1].sum()), "chance": None, "majority": _majority(counts_N3C),
        "seconds": seconds, "items_per_second": n / max(seconds, 1e-9),
    }  # fmt: skip


def _majority(counts_N3C: np.ndarray) -> float:
    """The mean over images of an image's mean IoU, where every pixel is said to be of the class that most pixels are of."""
    gold_NC = counts_N3C[:, 1]
    most, pixels_N = int(gold_NC.sum(0).argmax()), gold_NC.sum(1)
    occurring_N = (gold_NC > 0).sum(1) + (gold_NC[:, most] == 0)
    return float(np.mean(gold_NC[:, most] / np.maximum(pixels_N * occurring_N, 1)))


def _drawn(folder: Path, place: str, item: MaskedImage, gold: np.ndarray, answers: np.ndarray) -> str:
    """Write image, mask and answer beside one another; their place in the folder."""
    from PIL import Image

    height, width = gold.shape
    picture = item.open()[0].resize((width, height))
    parts = [picture, *(Image.fromarray(_coloured(numbers)) for numbers in (gold, answers))]
    panel = Image.new("RGB", (3 * width, height))
    for column, part in enumerate(parts):
        panel.paste(part, (column * width, 0))
    panel.thumbnail((720, 240))
    (folder / place).parent.mkdir(exist_ok=True)
    panel.save(folder / place)
    return place


def _coloured(numbers_HW: np.ndarray) -> np.ndarray:
    """(H, W, 3) of uint8: a hue for each class, far from its neighbours'; black where there is none."""
    from PIL import ImageColor

    highest = max(int(numbers_HW.max()), 0)
    hues = [ImageColor.getrgb(f"hsv({(c * 137.5 + 210) % 360:.0f}, 60%, {90 - 25 * (c % 2)}%)") for c in range(highest + 1)]
    palette = np.array([*hues, (0, 0, 0)], np.uint8)
    return palette[np.where(numbers_HW == IGNORED, highest + 1, numbers_HW)]


SCORER = MaskScorer()
