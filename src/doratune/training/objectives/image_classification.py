"""The class of an image: a pretrained image model of transformers, a head for the data's classes, cross entropy.

Data are labelled images (`data/image_sets/`), prepared by the model's own image processor. Every file is opened once before the
run, so that what is broken is known then. The model's head is kept where the data's classes are among its labels; else a new one is
drawn, trained whole beside any adapter and saved with it (`adapter/fresh.py`). Running statistics of batch normalization stay the
base's under an adapter (`adapter/statistics.py`). Cost: decoding each image once more than the run does.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch.nn import functional as F

from ...config import METHODS
from ...data.image_sets import ImageSet, LabelledImage, load_images, of_learnable_classes, usable
from ...data.loading import check_weights, weighted
from ...errors import UserError, listed, near_misses
from . import Objective

NOT_HERE = ("packing", "streaming", "train_on_prompt", "mirror", "sample_prompts")
"""Settings of text alone that would be ignored."""


class ImageClassification(Objective):
    """One class for each image."""

    unit = "images"

    def __init__(self, recipe):
        super().__init__(recipe)
        self.labels: list[str] = []

    def check(self) -> None:
        for name in NOT_HERE:
            if value := getattr(self.recipe, name):
                raise UserError(f"{name} is {value}, which is for text; objective image_classification has no use for it: drop it")
        if self.recipe.best_by == "token_accuracy":
            raise UserError("best_by is token_accuracy, and images have no tokens; give loss")
        if self.recipe.method not in (*METHODS, "full"):
            raise UserError(
                f"method {self.recipe.method} trains no head of classes; for images give full or one of {', '.join(METHODS)}"
            )

    def processor(self):
        from ...support.image_models import load_processor

        return load_processor(self.recipe.model, self.recipe.trust_remote_code)

    def examples(self, processor, say, counts):
        from ...support.image_models import pretrained_labels
        from .. import class_scores  # noqa: F401 (scikit-learn: missed now, not after the first epoch)

        recipe = self.recipe
        unusable: list[str] | None = [] if recipe.bad_items == "skip" else None
        images = self._images(unusable, say)
        own = pretrained_labels(recipe.model, recipe.trust_remote_code)
        known = bool(own) and set(images.classes) <= set(own)
        self.labels = own if known else images.classes
        head = "the model's own head, which has them" if known else "a new head"
        say(f"{len(images.classes)} classes ({listed(images.classes, 5)}); {head}")
        rows, eval_rows = self._split(images)
        rows = usable(rows, unusable)
        eval_unusable: list[str] | None = None if unusable is None else []
        if recipe.eval_data:
            held_out = load_images(recipe.eval_data, "val", recipe.columns, eval_unusable)
            eval_rows = of_known_classes(held_out, self.labels, eval_unusable)
        eval_rows = usable(eval_rows, eval_unusable)
        if not rows:
            raise UserError(f"{recipe.data} holds no image that can be used; the first: {unusable[0]}")
        if recipe.eval_data and not eval_rows:
            raise UserError(f"{recipe.eval_data} holds no image that can be used; the first: {eval_unusable[0]}")
        say(f"training data: {recipe.data}: {_report(rows, unusable)}")
        if eval_rows:
            say(f"evaluation data: {recipe.eval_data or recipe.data}: {_report(eval_rows, eval_unusable)}")
        for name, part, bad in (("training", rows, unusable), ("evaluation", eval_rows, eval_unusable)):
            counts[name] = {"examples": len(part), "unusable": len(bad or ())}
        return self._rows(rows, processor), self._rows(eval_rows, processor) if eval_rows else []

    def _images(self, unusable: list[str] | None, say) -> ImageSet:
        """Those of all sources, of classes that can be learned."""
        recipe = self.recipe
        sources = [recipe.data] if isinstance(recipe.data, str) else recipe.data
        check_weights(recipe.data_weights, sources)
        sets = [load_images(source, "train", recipe.columns, unusable) for source in sources]
        for note in (note for one in sets for note in one.notes):
            say(note)
        items = [x for one, w in zip(sets, recipe.data_weights or [1] * len(sets)) for x in weighted(one.items, w, recipe.seed)]
        if len(sets) == 1:
            return of_learnable_classes(replace(sets[0], items=items), unusable)
        classes = sorted({name for one in sets for name in one.classes})
        return of_learnable_classes(ImageSet(", ".join(sources), items, classes), unusable)

    def _split(self, images: ImageSet) -> tuple[list[LabelledImage], list[LabelledImage]]:
        """(training images, those split off for evaluation), as of text: `examples.py`."""
        recipe, items = self.recipe, list(images.items)
        if recipe.limit is not None or recipe.eval_size:
            random.Random(recipe.seed).shuffle(items)
        if recipe.eval_size >= len(items):
            raise UserError(f"eval_size is {recipe.eval_size}, but {recipe.data} holds {len(items)} images; make it smaller")
        return items[recipe.eval_size :][: recipe.limit], items[: recipe.eval_size]

    def _rows(self, items, processor):
        from ..image_rows import ImageRows

        return ImageRows(items, self.labels, processor)

    def load(self, dtype: str, quantize: str = "none", double_quantization: bool = False):
        from ...support.image_models import load_classifier

        r = self.recipe
        return load_classifier(r.model, self.labels, dtype, quantize, double_quantization, r.trust_remote_code)

    def compare(self, model, processor, rows, eval_rows) -> list[str]:
        """One image through the model: whether it takes what its processor makes."""
        kind = self.recipe.checkpointing
        if kind != "none" and not getattr(model, "supports_gradient_checkpointing", False):
            raise UserError(f"checkpointing is {kind}, which {type(model).__name__} cannot; set checkpointing: none")
        refuse_unfit(model, rows[0], self.collator(model, processor), self.recipe.model)
        return []

    def collator(self, model, processor):
        from ..image_rows import ImageCollator, dtype_of

        return ImageCollator(dtype_of(model), self.recipe.model)

    def arguments(self) -> dict:
        return {"train_sampling_strategy": "random", "dataloader_num_workers": self.recipe.workers, "label_names": ["labels"]}

    def trainer_settings(self) -> dict:
        return {
            "compute_loss_func": cross_entropy,
            "compute_metrics": _figures,
            "preprocess_logits_for_metrics": lambda outputs, labels: outputs[0] if isinstance(outputs, tuple) else outputs,
        }

    def units_in(self, inputs) -> int:
        return len(inputs["pixel_values"])


def cross_entropy(outputs, labels, num_items_in_batch=None):
    """The mean over the images of an optimizer step: models here take `num_items_in_batch` without using it, and the loss of
    accumulated batches would count as often as there are."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if num_items_in_batch is None:
        return F.cross_entropy(logits.float(), labels)
    return F.cross_entropy(logits.float(), labels, reduction="sum") / num_items_in_batch


def of_known_classes(images: ImageSet, labels: list[str], unusable: list[str] | None = None) -> list[LabelledImage]:
    """The images whose label the model has.

    Raises:
        UserError: one of another label, unless `unusable` takes its line.
    """
    known, there = set(labels), []
    for item in images.items:
        if item.label in known:
            there.append(item)
            continue
        near = near_misses(item.label, labels)
        problem = f"{item.place}: the label {item.label!r} is none of the model's: {listed(labels, 8)}{near}"
        if unusable is None:
            raise UserError(problem)
        unusable.append(problem)
    return there


@torch.no_grad()
def refuse_unfit(model, row: dict, collate, name: str) -> None:
    """Raise where a model does not take an image as it was prepared.

    Raises:
        UserError: the model's reason.
    """
    batch = collate([row])
    try:
        model(pixel_values=batch["pixel_values"].to(model.device))
    except Exception as error:  # of any model
        size = " × ".join(map(str, batch["pixel_values"].shape[1:]))
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} does not take {row['place']} as its image processor prepares it, {size} ({reason}); make size in "
            "preprocessor_config.json and image_size in config.json agree"
        ) from None


def _figures(prediction) -> dict[str, float]:
    from ..class_scores import class_scores, softmax

    return class_scores(prediction.label_ids, softmax(prediction.predictions))


def _report(items: list[LabelledImage], unusable: list[str] | None) -> str:
    per_class: dict[str, int] = {}
    for item in items:
        per_class[item.label] = per_class.get(item.label, 0) + 1
    low, high = min(per_class.values()), max(per_class.values())
    text = f"{len(items)} images of {len(per_class)} classes ({low}{f' to {high}' if high > low else ''} each)"
    return text + (f"; {len(unusable)} unusable items skipped (the first: {unusable[0]})" if unusable else "")


OBJECTIVE = ImageClassification
