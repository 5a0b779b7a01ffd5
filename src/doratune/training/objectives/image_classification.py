"""The class of an image: a pretrained image model of transformers, a head for the data's classes, cross entropy.

Data are labelled images (`data/image_sets/`), prepared by the model's own image processor. The model's head is kept where the
data's classes are among its labels. Cost: see `image_objective.py`.
"""

from __future__ import annotations

from dataclasses import replace

from torch.nn import functional as F

from ...data.image_sets import ImageSet, LabelledImage, load_images, of_learnable_classes
from ...data.loading import weighted
from ...errors import UserError, listed, near_misses
from ...support.image_heads.classification import HEAD
from ..image_objective import ImageObjective


class ImageClassification(ImageObjective):
    """One class for each image."""

    head = HEAD
    trains = "head of classes"

    def read(self, sources, unusable, say):
        from .. import class_scores  # noqa: F401 (scikit-learn: missed now, not after the first epoch)

        images, own = self._images(sources, unusable, say), self.own_labels()
        known = bool(own) and set(images.classes) <= set(own)
        self.labels = own if known else images.classes
        head = "the model's own head, which has them" if known else "a new head"
        say(f"{len(images.classes)} classes ({listed(images.classes, 5)}); {head}")
        return images.items

    def _images(self, sources: list[str], unusable: list[str] | None, say) -> ImageSet:
        """Those of all sources, of classes that can be learned."""
        recipe = self.recipe
        sets = [load_images(source, "train", recipe.columns, unusable) for source in sources]
        for note in (note for one in sets for note in one.notes):
            say(note)
        items = [x for one, w in zip(sets, recipe.data_weights or [1] * len(sets)) for x in weighted(one.items, w, recipe.seed)]
        if len(sets) == 1:
            return of_learnable_classes(replace(sets[0], items=items), unusable)
        classes = sorted({name for one in sets for name in one.classes})
        return of_learnable_classes(ImageSet(", ".join(sources), items, classes), unusable)

    def held_out(self, source, unusable):
        return of_known_classes(load_images(source, "val", self.recipe.columns, unusable), self.labels, unusable)

    def report(self, items) -> str:
        per_class: dict[str, int] = {}
        for item in items:
            per_class[item.label] = per_class.get(item.label, 0) + 1
        low, high = min(per_class.values()), max(per_class.values())
        return f"{len(items)} images of {len(per_class)} classes ({low}{f' to {high}' if high > low else ''} each)"

    def rows(self, items, processor):
        from ..image_rows import ImageRows

        return ImageRows(items, self.labels, processor)

    def trainer_settings(self) -> dict:
        return {
            "compute_loss_func": cross_entropy,
            "compute_metrics": _figures,
            "preprocess_logits_for_metrics": lambda outputs, labels: outputs[0] if isinstance(outputs, tuple) else outputs,
        }


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


def _figures(prediction) -> dict[str, float]:
    from ..class_scores import class_scores, softmax

    return class_scores(prediction.label_ids, softmax(prediction.predictions))


OBJECTIVE = ImageClassification
