"""Classes of images: the most probable class of each, and accuracy, balanced accuracy and AUROC of all (`class_scores.py`).

    results.json               right/total, accuracy with standard error, balanced_accuracy, auroc, majority, chance
    TASK.likelihood.jsonl      an image a line: its label, the model's, and the probability of each class, of up to PROBABILITIES

A task is a source of labelled images (`data/image_sets/`), its split `test` where it has splits. Protocol `likelihood`, because the
most probable class is the answer. Batches are of one size and nothing in a model in evaluation mode looks across one: in float32
the score does not depend on the batch size. Cost: one forward an image; each file is decoded once before, to find what is broken.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ...data.image_sets import LabelledImage, load_images, usable
from ...errors import UserError, listed
from ...support.image_heads.classification import HEAD
from ...support.image_models import labels_of
from ...support.tables import aligned
from ...training.class_scores import class_scores
from ...training.image_rows import ImageCollator, ImageRows, dtype_of, refuse_unfit
from ...training.objectives.image_classification import of_known_classes
from .images import PROTOCOL, ImageScorer

PROBABILITIES = 100
"""The most classes of which an image's record holds all probabilities."""


class ClassScorer(ImageScorer):
    objective = "image_classification"
    head = HEAD

    def look(self, source: str, settings) -> None:
        load_images(source, "test", settings.columns, [])

    def read(self, source: str, model, processor, limit: int | None, settings, unusable: list[str] | None) -> list[LabelledImage]:
        images = load_images(source, "test", settings.columns, unusable)
        items = usable(of_known_classes(images, labels_of(model.config), unusable)[:limit], unusable)
        if not items:
            raise UserError(f"{source} holds no image that can be used; the first: {(unusable or ['none'])[0]}")
        return items

    def score(self, model, processor, name: str, items: list, batch_size: int, folder: Path, progress) -> tuple[dict, list]:
        return _score_task(model, processor, name, items, batch_size, progress)

    def show(self, summary: dict) -> str:
        head = ["task", "right/total", "accuracy", "balanced", "AUROC", "chance", "majority", "s", "images/s"]
        rows = []
        for r in summary["results"]:
            accuracy = f"{100 * r['accuracy']:.1f} ± {100 * r['standard_error']:.1f} %"
            auroc = f"{r['auroc']:.3f}" if r["auroc"] is not None else "-"
            shares = [f"{100 * r[key]:.1f} %" for key in ("chance", "majority")]
            balanced = f"{100 * r['balanced_accuracy']:.1f} %"
            speed = [f"{r['seconds']:.0f}", f"{r['items_per_second']:.1f}"]
            rows.append([r["task"], f"{r['right']}/{r['total']}", accuracy, balanced, auroc, *shares, *speed])
        return "\n".join([*aligned(head, rows), f"peak memory {summary['peak_bytes'] / 2**30:.2f} GiB"])


def _score_task(model, processor, name: str, items: list[LabelledImage], batch_size: int, progress) -> tuple[dict, list[dict]]:
    """(figures, a record for each image)."""
    labels = labels_of(model.config)
    started = time.perf_counter()
    with progress(name, len(items)) as advance:
        probabilities_NC = probabilities(model, ImageRows(items, labels, processor), batch_size, advance)
    answers = [labels[i] for i in probabilities_NC.argmax(1)]
    records = []
    for item, answer, row in zip(items, answers, probabilities_NC):
        record = {"prompt": item.name, "gold": item.label, "output": answer, "answer": answer, "correct": answer == item.label}
        if len(labels) <= PROBABILITIES:
            record["probabilities"] = {label: round(float(p), 6) for label, p in zip(labels, row)}
        records.append(record)
    gold = np.array([labels.index(item.label) for item in items])
    figures = class_scores(gold, probabilities_NC)
    n, accuracy, seconds = len(items), figures["accuracy"], time.perf_counter() - started
    result = {
        "task": name, "protocol": PROTOCOL, "right": sum(r["correct"] for r in records), "total": n,
        "accuracy": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / n), "unparsable": 0.0,
        "balanced_accuracy": figures["balanced_accuracy"], "auroc": figures.get("auroc"),
        "chance": 1 / len(labels), "majority": max(Counter(gold.tolist()).values()) / n,
        "seconds": seconds, "items_per_second": n / max(seconds, 1e-9),
    }  # fmt: skip
    return result, records


@torch.no_grad()
def probabilities(model, rows: ImageRows, batch_size: int, advance) -> np.ndarray:
    """(N, C) in float64, in the order of the rows.

    Raises:
        UserError: the model does not take the images, or what it says of one is NaN or infinite.
    """
    collate = ImageCollator(dtype_of(model), str(model.name_or_path))
    refuse_unfit(model, rows[0], collate, str(model.name_or_path))
    parts = []
    for start in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        logits = model(pixel_values=collate(batch)["pixel_values"].to(model.device)).logits.double().cpu()
        if bad := [row["place"] for row, whole in zip(batch, torch.isfinite(logits).all(1)) if not whole]:
            raise UserError(f"the model's scores of {listed(bad, 2)} are NaN or infinite; try dtype float32, or train it again")
        parts.append(logits.softmax(1))
        advance(len(batch))
    return torch.cat(parts).numpy()


SCORER = ClassScorer()
