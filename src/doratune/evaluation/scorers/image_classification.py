"""Classes of images: the most probable class of each, and accuracy, balanced accuracy and AUROC of all (`class_scores.py`).

    results.json               right/total, accuracy with standard error, balanced_accuracy, auroc, majority, chance
    TASK.likelihood.jsonl      an image a line: its label, the model's, and the probability of each class, of up to PROBABILITIES

A task is a source of labelled images (`data/image_sets/`), its split `test` where it has splits. Protocol `likelihood`, because the
most probable class is the answer. Batches are of one size and nothing in a model in evaluation mode looks across one: in float32
the score does not depend on the batch size. Cost: one forward an image; each file is decoded once before, to find what is broken.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...adapter.attach import record_of
from ...checkpoint.adapter import load
from ...checkpoint.merge import wanted_of
from ...checkpoint.quantized import recorded_quantization
from ...data.image_sets import LabelledImage, load_images, place_of, usable
from ...errors import UserError, listed
from ...support.environment import peak_bytes
from ...support.files import write_json
from ...support.folders import whole_folder
from ...support.image_models import (
    PROCESSOR,
    is_classifier,
    is_image_body,
    labels_of,
    load_classifier,
    load_processor,
    pretrained_labels,
)
from ...support.tables import aligned
from ...training.class_scores import class_scores
from ...training.image_rows import ImageCollator, ImageRows, dtype_of
from ...training.objectives.image_classification import of_known_classes, refuse_unfit
from ..evaluate import refuse_spoiled
from . import Scorer

PROTOCOL = "likelihood"
PROBABILITIES = 100
"""The most classes of which an image's record holds all probabilities."""

ImageTask = tuple[str, list[LabelledImage]]


class ClassScorer(Scorer):
    objective = "image_classification"
    protocols = (PROTOCOL,)

    def scores(self, class_name: str, model_type: str) -> bool:
        return is_classifier(class_name) or is_image_body(model_type)

    def after_training(self, recipe, say, progress):
        return ScoredImages(recipe, say, progress)

    def evaluate(self, settings, model: str, say, progress) -> dict:
        refuse_text_settings(settings)
        tasks = _names([settings.task] if isinstance(settings.task, str) else settings.task)
        classifier, processor, facts = load_both(settings, model)
        unusable: list[str] | None = [] if settings.bad_items == "skip" else None
        read = [
            (name, read_task(source, labels_of(classifier.config), settings.limit, settings.columns, unusable))
            for name, source in tasks.items()
        ]
        if unusable:
            say(f"{len(unusable)} unusable images skipped (the first: {unusable[0]})")
        output = Path(settings.output)
        return score_images(classifier, processor, read, settings.batch_size, output, unusable, progress) | {"method": facts}

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


class ScoredImages:
    """Scores the model that a training run ends with, into OUTPUT/scores/after; what cannot be read is seen before the training."""

    def __init__(self, recipe, say, progress):
        self.recipe, self.say, self.progress = recipe, say, progress
        self.names, self.tasks, self.unusable = _names(recipe.tasks), [], None
        for source in self.names.values():
            load_images(source, "test", recipe.columns, [])

    def check(self, model, processor) -> None:
        recipe, labels = self.recipe, labels_of(model.config)
        self.unusable = [] if recipe.bad_items == "skip" else None
        self.tasks = [
            (name, read_task(source, labels, recipe.tasks_limit, recipe.columns, self.unusable))
            for name, source in self.names.items()
        ]

    def __call__(self, model, processor) -> None:
        folder = Path(self.recipe.output) / "scores" / "after"
        size = self.recipe.tasks_batch_size
        summary = score_images(model, processor, self.tasks, size, folder, self.unusable, self.progress)
        self.say(SCORER.show(summary))


def refuse_text_settings(settings) -> None:
    """Raise for settings of `doratune evaluate` that mean nothing for images."""
    if settings.protocol not in ("both", "all", PROTOCOL):
        raise UserError(f"protocol is {settings.protocol}, but a class of an image is not written; set protocol: {PROTOCOL}")
    for name in ("beams", "max_new_tokens"):
        if (value := getattr(settings, name)) is not None:
            raise UserError(f"{name} is {value}, which is for models that write; a classifier of images does not: drop it")


def _names(sources: Sequence[str]) -> dict[str, str]:
    """Name → source of each task.

    Raises:
        UserError: two of one name.
    """
    names: dict[str, str] = {}
    for source in sources:
        path, split = place_of(re.sub(r"\[:\d+\]$", "", source))
        name = "-".join(filter(None, (path.stem or "images", split)))
        if name in names:
            raise UserError(f"two tasks are called {name!r}; rename one of their files or folders")
        names[name] = source
    return names


def read_task(source: str, labels: list[str], limit: int | None, columns, unusable: list[str] | None = None) -> list[LabelledImage]:
    """The images of a task whose labels the model has, each looked at.

    Raises:
        UserError: see `load_images`, `usable` and `of_known_classes`; none is left.
    """
    images = load_images(source, "test", columns, unusable)
    items = usable(of_known_classes(images, labels, unusable)[:limit], unusable)
    if not items:
        raise UserError(f"{source} holds no image that can be used; the first: {(unusable or ['none'])[0]}")
    return items


def load_both(settings, name: str):
    """(the classifier with the settings' adapter, its image processor, (base model, method, rank))."""
    recorded = recorded_quantization(settings.adapter) if settings.adapter else None
    quantize = (recorded or "none") if settings.quantize == "recorded" else settings.quantize
    trusted, own = settings.trust_remote_code, pretrained_labels(name, settings.trust_remote_code)
    labels, folder = own, None
    if settings.adapter:
        folder = Path(settings.adapter) if (Path(settings.adapter) / PROCESSOR).is_file() else None
        record = wanted_of(Path(settings.adapter)).settings.get("id2label") or {}
        labels = [str(record[i]) for i in sorted(record, key=int)] or own
    if not labels:
        raise UserError(f"{name} has no head that tells classes of images, and no adapter brings one; train it first")
    processor = load_processor(name, trusted, folder)
    model = load_classifier(name, labels, settings.dtype, quantize, trust_remote_code=trusted, complete=not settings.adapter)
    if not settings.adapter:
        return model, processor, (name, None, None)
    config = record_of(load(model, settings.adapter, check_base=settings.check_base)).config
    return model, processor, (name, config.method, config.rank)


def score_images(model, processor, tasks: Sequence[ImageTask], batch_size: int, output: Path | None, unusable, progress) -> dict:
    """Score a classifier that is loaded: {"results": […], "averages": [], "peak_bytes": …}, and the same as files.

    Raises:
        UserError: parameters or scores that are NaN or infinite, or images that the model does not take.
    """
    refuse_spoiled(model)
    was_training = model.training
    model.eval()
    scored = [(name, *_score_task(model, processor, name, items, batch_size, progress)) for name, items in tasks]
    model.train(was_training)
    summary = {"results": [result for _, result, _ in scored], "averages": [], "peak_bytes": peak_bytes()}
    if unusable is not None:
        summary["unusable"] = unusable
    if output is not None:
        with whole_folder(output, key="results.json") as folder:
            for name, _, records in scored:
                with open(folder / f"{name}.{PROTOCOL}.jsonl", "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_json(folder / "results.json", summary)
    return summary


def _score_task(model, processor, name: str, items: list[LabelledImage], batch_size: int, progress) -> tuple[dict, list[dict]]:
    """(figures, a record for each image)."""
    labels = labels_of(model.config)
    advance, close = progress(name, len(items)) if progress else (lambda n: None, lambda: None)
    started = time.perf_counter()
    probabilities_NC = probabilities(model, ImageRows(items, labels, processor), batch_size, advance)
    close()
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
