"""What objectives of image models share: the settings that they read, the examples of a run, the model with its head.

Every file is opened once before the run, so that what is broken is known then. The model's head is kept where it was trained on
the data's labels; else a new one is drawn, trained whole beside any adapter and saved with it (`adapter/fresh.py`). Running
statistics of batch normalization stay the base's under an adapter (`adapter/statistics.py`). A subclass says how images are read.
Cost: decoding each file once more than the run does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ..config import METHODS
from ..data.image_sets import usable
from ..data.loading import check_weights
from ..errors import UserError
from ..support.image_heads import ImageHead
from .objectives import HELD_OUT, Objective


class ImageObjective(Objective):
    """Subclasses declare `head` and `trains`, and override what raises here."""

    unit = "images"
    reads = (*HELD_OUT, "columns")
    head: ImageHead
    trains: str
    """What the head is, for messages: "head of classes"."""

    def __init__(self, recipe):
        super().__init__(recipe)
        self.labels: list[str] = []

    def read(self, sources: Sequence[str], unusable: list[str] | None, say) -> list[Any]:
        """The training images of all sources, and `labels`, the model's, settled by them.

        Raises:
            UserError: see `examples`.
        """
        raise NotImplementedError

    def held_out(self, source: str, unusable: list[str] | None) -> list[Any]:
        """The evaluation images of a source, for the labels as they are settled."""
        raise NotImplementedError

    def report(self, items: list[Any]) -> str:
        """How many there are of what."""
        raise NotImplementedError

    def rows(self, items: list[Any], processor) -> Any:
        """The images as the model reads them."""
        raise NotImplementedError

    def check(self) -> None:
        recipe = self.recipe
        if recipe.best_by == "token_accuracy":
            raise UserError("best_by is token_accuracy, and images have no tokens; give loss")
        if recipe.method not in (*METHODS, "full"):
            known = ", ".join(METHODS)
            raise UserError(f"method {recipe.method} trains no {self.trains}; for images give full or one of {known}")

    def processor(self):
        from ..support.image_models import load_processor

        return load_processor(self.recipe.model, self.recipe.trust_remote_code, head=self.head)

    def examples(self, processor, say, counts):
        recipe = self.recipe
        unusable: list[str] | None = [] if recipe.bad_items == "skip" else None
        eval_unusable: list[str] | None = None if unusable is None else []
        sources = [recipe.data] if isinstance(recipe.data, str) else recipe.data
        check_weights(recipe.data_weights, sources)
        items, eval_items = self._split(self.read(sources, unusable, say))
        items = usable(items, unusable)
        if recipe.eval_data:
            eval_items = self.held_out(recipe.eval_data, eval_unusable)
        eval_items = usable(eval_items, eval_unusable)
        parts = (("training", recipe.data, items, unusable), ("evaluation", recipe.eval_data, eval_items, eval_unusable))
        for name, source, part, bad in parts:
            if source and not part:
                raise UserError(f"{source} holds no image that can be used; the first: {bad[0]}")
            if part:
                skipped = f"; {len(bad)} unusable items skipped (the first: {bad[0]})" if bad else ""
                say(f"{name} data: {source or recipe.data}: {self.report(part)}{skipped}")
            counts[name] = {"examples": len(part), "unusable": len(bad or ())}
        return self.rows(items, processor), self.rows(eval_items, processor) if eval_items else []

    def _split(self, items: list[Any]) -> tuple[list[Any], list[Any]]:
        """(training images, those split off for evaluation), as of text: `examples.py`."""
        recipe, items = self.recipe, list(items)
        if recipe.limit is not None or recipe.eval_size:
            random.Random(recipe.seed).shuffle(items)
        if recipe.eval_size >= len(items):
            raise UserError(f"eval_size is {recipe.eval_size}, but {recipe.data} holds {len(items)} images; make it smaller")
        return items[recipe.eval_size :][: recipe.limit], items[: recipe.eval_size]

    def own_labels(self) -> list[str]:
        """The labels of the model's own head; none where it has none of this kind."""
        from ..support.image_models import pretrained_labels

        return pretrained_labels(self.recipe.model, self.head, self.recipe.trust_remote_code)

    def load(self, dtype: str, quantize: str = "none", double_quantization: bool = False):
        from ..support.image_models import load_image_model

        r = self.recipe
        return load_image_model(r.model, self.labels, dtype, quantize, double_quantization, r.trust_remote_code, head=self.head)

    def compare(self, model, processor, rows, eval_rows) -> list[str]:
        """One image through the model: whether it takes what its processor makes."""
        from .image_rows import refuse_unfit

        kind = self.recipe.checkpointing
        if kind != "none" and not getattr(model, "supports_gradient_checkpointing", False):
            raise UserError(f"checkpointing is {kind}, which {type(model).__name__} cannot; set checkpointing: none")
        refuse_unfit(model, rows[0], self.collator(model, processor), self.recipe.model)
        return []

    def collator(self, model, processor):
        from .image_rows import ImageCollator, dtype_of

        return ImageCollator(dtype_of(model), self.recipe.model)

    def arguments(self) -> dict:
        return {"train_sampling_strategy": "random", "dataloader_num_workers": self.recipe.workers, "label_names": ["labels"]}

    def units_in(self, inputs) -> int:
        return len(inputs["pixel_values"])
