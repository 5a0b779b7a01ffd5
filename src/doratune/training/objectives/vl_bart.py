"""Answers to questions about images and video, and captions, by VL-BART: several tasks in one run (section 5.2 of the paper).

Sources are tasks (`data/visual_tasks/`); what they look at becomes features of an image tower once (`data/visual_features/`), in
the folder `features`; BART reads them in front of its text (`support/vl_bart.py`). Batches are of one task each, by the tasks'
sizes (`task_order.py`). A BART that reads text alone gets a visual embedding that is drawn, trained whole and saved beside any
adapter; one that has it keeps it, frozen unless `projector` is whole. Cost: the tower's pass, once; it is not in memory afterwards.
"""

from __future__ import annotations

import random

from torch.nn import functional as F

from ...config import METHODS
from ...data.loading import check_weights, weighted
from ...data.visual_features.settings import FeatureSettings
from ...errors import UserError
from ...support.fields import setting_names
from . import HELD_OUT, Objective


class VLBart(Objective):
    """Text about what is seen."""

    unit = "examples"
    reads = (*HELD_OUT, *setting_names(FeatureSettings), "max_length", "projector")

    def check(self) -> None:
        recipe = self.recipe
        if recipe.method not in (*METHODS, "full"):
            raise UserError(
                f"method {recipe.method} trains no visual embedding; for VL-BART give full or one of {', '.join(METHODS)}"
            )

    def processor(self):
        from ...support.models import load_tokenizer

        return load_tokenizer(self.recipe.model, self.recipe.trust_remote_code)

    def examples(self, processor, say, counts):
        from ...support.devices import device_of
        from ...support.image_towers import ImageTower
        from ...support.vl_bart import VisualInput, visual_input
        from ..visual_rows import VisualRows, training_rows

        recipe = self.recipe
        own = visual_input(recipe.model, recipe.trust_remote_code)
        name = recipe.image_tower or (own.tower if own else None)
        if not name:
            raise UserError("image_tower is not set; give the image model whose features are read, a hub id or a folder")
        tower = ImageTower(name, device_of(recipe.device), recipe.trust_remote_code)
        sources = [recipe.data] if isinstance(recipe.data, str) else recipe.data
        check_weights(recipe.data_weights, sources)
        parts = [self._seen(source, "train", tower, say, counts) for source in sources]
        weights = recipe.data_weights or [1] * len(parts)
        seen = [one for part, weight in zip(parts, weights) for one in weighted(part, weight, recipe.seed)]
        if recipe.limit is not None or recipe.eval_size:
            random.Random(recipe.seed).shuffle(seen)
        if recipe.eval_size >= len(seen):
            raise UserError(f"eval_size is {recipe.eval_size}, but {recipe.data} holds {len(seen)} items; make it smaller")
        seen, held = seen[recipe.eval_size :][: recipe.limit], seen[: recipe.eval_size]
        if recipe.eval_data:
            held = self._seen(recipe.eval_data, "val", tower, say, counts)
        used = [one.features.file for one in (*seen, *held)]
        sizes = {"cells": recipe.cells, "frames": recipe.frames, "frame_rate": recipe.frame_rate}
        facts = {"tower": name, "fingerprint": tower.fingerprint} | sizes
        self.visual = VisualInput(size=used[0].size, places=max(file.places for file in used), **facts)
        rows, held_rows = training_rows(seen, recipe.seed), training_rows(held, recipe.seed)
        for part, name in ((rows, "training"), (held_rows, "evaluation")):
            counts.setdefault(name, {"unusable": 0})["examples"] = len(part)
        return (VisualRows(part, processor, recipe.max_length) if part else [] for part in (rows, held_rows))

    def _seen(self, source: str, use: str, tower, say, counts) -> list:
        """The usable items of a source with their features."""
        from ...data.visual_features.extract import features_of
        from ...data.visual_tasks import load_visual_items, parsed
        from ..visual_rows import SeenItem

        skip = self.recipe.bad_items == "skip"
        unusable: list[str] = []
        items = load_visual_items(source, use, unusable if skip else None)
        task, place, split, _ = parsed(source)
        label = "-".join(filter(None, (task.name if task else place.stem, (split or use) if task else "")))
        settings = FeatureSettings(**{name: getattr(self.recipe, name) for name in setting_names(FeatureSettings)})
        features = features_of(items, label, tower, settings, skip)
        items = features.usable(items, unusable)
        if unusable and not (skip and items):
            raise UserError(unusable[0] if not skip else f"{source} holds no item that can be used; the first: {unusable[0]}")
        report = f"; {len(unusable)} unusable items skipped (the first: {unusable[0]})" if unusable else ""
        say(f"{source}: {len(items)} items, {features.file.count} with features in {features.file.path}{report}")
        part = counts.setdefault("training" if use == "train" else "evaluation", {"unusable": 0})
        part["unusable"] += len(unusable)
        return [SeenItem(item, features) for item in items]

    def load(self, dtype: str, quantize: str = "none", double_quantization: bool = False):
        from ...support.vl_bart import load_vl_bart

        r = self.recipe
        return load_vl_bart(r.model, self.visual, dtype, quantize, double_quantization, r.trust_remote_code)

    def compare(self, model, processor, rows, eval_rows) -> list[str]:
        most = model.config.max_position_embeddings
        if self.recipe.max_length > most:
            raise UserError(f"max_length is {self.recipe.max_length}, but {self.recipe.model} has {most} positions; set {most}")
        if len(processor) > model.config.vocab_size:
            held = f"{model.config.vocab_size} tokens and its tokenizer {len(processor)}"
            raise UserError(f"{self.recipe.model} has {held}; they do not belong together: copy the model again")
        sizes: dict[str, int] = {}
        for seen, _ in rows.rows:
            sizes[seen.item.task] = sizes.get(seen.item.task, 0) + 1
        return [f"tasks by size: {', '.join(f'{name} {count}' for name, count in sizes.items())}"]

    def collator(self, model, processor):
        from ..visual_rows import VisualCollator

        return VisualCollator(processor.pad_token_id, model.config.decoder_start_token_id)

    def arguments(self) -> dict:
        return {"train_sampling_strategy": "random", "dataloader_num_workers": self.recipe.workers, "label_names": ["labels"]}

    def trainer_settings(self) -> dict:
        return {"compute_loss_func": token_cross_entropy}

    def units_in(self, inputs) -> int:
        return len(inputs["input_ids"])


def token_cross_entropy(outputs, labels, num_items_in_batch=None):
    """The mean over the answers' tokens of an optimizer step: BART takes `num_items_in_batch` without using it, and the loss of
    accumulated batches would count as often as there are."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


OBJECTIVE = VLBart
