"""What scorers of image models share: a model and its processor, tasks that are sources of images, figures and records as files.

A task's part is `test` where it has parts. Protocol `likelihood`, because the most probable class is the answer. A subclass says
how a task is read and how it is scored. Cost: each file is decoded once before the scoring, to find what is broken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...adapter.attach import record_of
from ...checkpoint.adapter import load
from ...checkpoint.merge import wanted_of
from ...checkpoint.quantized import recorded_quantization
from ...data.image_sets import place_of
from ...errors import UserError
from ...support.devices import device_of
from ...support.environment import peak_bytes
from ...support.files import write_json
from ...support.folders import whole_folder
from ...support.image_heads import ImageHead, head_for
from ...support.image_models import PROCESSOR, load_image_model, load_processor, pretrained_labels
from ..evaluate import refuse_spoiled
from . import Scorer

PROTOCOL = "likelihood"

ImageTask = tuple[str, list[Any]]
"""Name and items of a task."""


class ImageScorer(Scorer):
    """Subclasses declare `objective` and `head`, and override what raises here."""

    protocols = (PROTOCOL,)
    head: ImageHead

    def scores(self, class_name: str, model_type: str) -> bool:
        return head_for(class_name, model_type) is self.head

    def look(self, source: str, settings) -> None:
        """Raise UserError where a source cannot be a task, before anything is loaded."""
        raise NotImplementedError

    def read(self, source: str, model, processor, limit: int | None, settings, unusable: list[str] | None) -> list:
        """The items of a task that the model has labels for, each looked at.

        Raises:
            UserError: an item that cannot be used, unless `unusable` takes its line; none is left.
        """
        raise NotImplementedError

    def score(self, model, processor, name: str, items: list, batch_size: int, folder: Path, progress) -> tuple[dict, list]:
        """(figures of a task, a record for each item); folder: for what records show beside themselves."""
        raise NotImplementedError

    def after_training(self, recipe, say, progress):
        return ScoredImages(self, recipe, say, progress)

    def evaluate(self, settings, model: str, say, progress) -> dict:
        refuse_text_settings(settings)
        names = names_of([settings.task] if isinstance(settings.task, str) else settings.task)
        image_model, processor, facts = load_both(settings, model, self.head)
        unusable: list[str] | None = [] if settings.bad_items == "skip" else None
        tasks = [
            (name, self.read(source, image_model, processor, settings.limit, settings, unusable)) for name, source in names.items()
        ]
        if unusable:
            say(f"{len(unusable)} unusable images skipped (the first: {unusable[0]})")
        output = Path(settings.output)
        return self.summary(image_model, processor, tasks, settings.batch_size, output, unusable, progress) | {"method": facts}

    def summary(self, model, processor, tasks: Sequence[ImageTask], batch_size: int, output: Path, unusable, progress) -> dict:
        """Score a model that is loaded: {"results": […], "averages": [], "peak_bytes": …}, and the same as files.

        Raises:
            UserError: parameters or scores that are NaN or infinite, or images that the model does not take.
        """
        refuse_spoiled(model)
        was_training = model.training
        model.eval()
        with whole_folder(output, key="results.json") as folder:
            results = []
            for name, items in tasks:
                result, records = self.score(model, processor, name, items, batch_size, folder, progress)
                results.append(result)
                with open(folder / f"{name}.{PROTOCOL}.jsonl", "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            summary = {"results": results, "averages": [], "peak_bytes": peak_bytes()}
            if unusable is not None:
                summary["unusable"] = unusable
            write_json(folder / "results.json", summary)
        model.train(was_training)
        return summary


class ScoredImages:
    """Scores the model that a training run ends with, into OUTPUT/scores/after; what cannot be read is seen before the training."""

    def __init__(self, scorer: ImageScorer, recipe, say, progress):
        self.scorer, self.recipe, self.say, self.progress = scorer, recipe, say, progress
        self.names, self.tasks, self.unusable = names_of(recipe.tasks), [], None
        for source in self.names.values():
            scorer.look(source, recipe)

    def check(self, model, processor) -> None:
        recipe = self.recipe
        self.unusable = [] if recipe.bad_items == "skip" else None
        self.tasks = [
            (name, self.scorer.read(source, model, processor, recipe.tasks_limit, recipe, self.unusable))
            for name, source in self.names.items()
        ]

    def __call__(self, model, processor) -> None:
        folder, size = Path(self.recipe.output) / "scores" / "after", self.recipe.tasks_batch_size
        self.say(self.scorer.show(self.scorer.summary(model, processor, self.tasks, size, folder, self.unusable, self.progress)))


def refuse_text_settings(settings) -> None:
    """Raise for settings of `doratune evaluate` that mean nothing for images."""
    if settings.protocol not in ("both", "all", PROTOCOL):
        raise UserError(f"protocol is {settings.protocol}, but a class of an image is not written; set protocol: {PROTOCOL}")
    for name in ("beams", "max_new_tokens"):
        if (value := getattr(settings, name)) is not None:
            raise UserError(f"{name} is {value}, which is for models that write; a classifier of images does not: drop it")


def names_of(sources: Sequence[str]) -> dict[str, str]:
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


def load_both(settings, name: str, head: ImageHead):
    """(the model with the settings' adapter, its image processor, (base model, method, rank))."""
    recorded = recorded_quantization(settings.adapter) if settings.adapter else None
    quantize = (recorded or "none") if settings.quantize == "recorded" else settings.quantize
    trusted, own = settings.trust_remote_code, pretrained_labels(name, head, settings.trust_remote_code)
    labels, folder, trained = own, None, {}
    if settings.adapter:
        folder = Path(settings.adapter) if (Path(settings.adapter) / PROCESSOR).is_file() else None
        trained = wanted_of(Path(settings.adapter)).settings
        record = trained.get("id2label") or {}
        labels = [str(record[i]) for i in sorted(record, key=int)] or own
    if not labels:
        raise UserError(f"{name} has no head that {head.does}, and no adapter brings one; train it first")
    processor = load_processor(name, trusted, folder, head)
    whole = {"trust_remote_code": trusted, "complete": not settings.adapter, "head": head}
    model = load_image_model(name, labels, settings.dtype, quantize, **whole)
    if quantize == "none":
        model.to(device_of(settings.device))
    for key in trained.keys() - {"id2label", "label2id", "problem_type"}:  # what else was recorded with the labels
        setattr(model.config, key, trained[key])
    if not settings.adapter:
        return model, processor, (name, None, None)
    config = record_of(load(model, settings.adapter, check_base=settings.check_base)).config
    return model, processor, (name, config.method, config.rank)
