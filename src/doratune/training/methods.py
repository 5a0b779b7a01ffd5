"""What a recipe's method trains and leaves behind, behind one face, so that a run does not ask which it is.

adapters (lora, dora, vera, …)    OUTPUT/adapter    the frozen base in the recipe's dtype
full fine-tuning                  OUTPUT/model      all weights in float32, bf16 or fp16 by autocast: AdamW's steps would be
                                                    lost in 16-bit weights
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .. import baselines
from ..adapter.attach import attach
from ..adapter.inspect import inspect
from ..adapter.verify import verify
from ..baselines.config import METHODS as BASELINES
from ..config import METHODS
from ..errors import UserError, listed
from ..support.folders import whole_folder
from ..support.models import quiet_loading, torch_dtype
from ..support.processes import launched
from ..support.transformers4 import readable_by_both
from .base_blocks import base_blocks
from .movement import Movement, measure
from .objectives import Objective, objective_of
from .recipe import TrainRecipe
from .trainer import BaselineTrainer, DoRATrainer, FullTrainer
from .visual import freeze_vision


class AdapterMethod:
    """An adapter over the frozen base."""

    result = "adapter"
    trainer = DoRATrainer

    def __init__(self, recipe: TrainRecipe, objective: Objective):
        self.recipe, self.objective = recipe, objective

    def load(self, say: Callable[[str], None] = print) -> nn.Module:
        """The base; under `fsdp` each process's part of it, where that can be."""
        r = self.recipe
        blocks = base_blocks(r, self.objective, say) if launched()[1] > 1 else None
        return self.objective.load(r.dtype, r.quantize, r.double_quantization, **({"blocks": blocks} if blocks else {}))

    def prepare(self, model: nn.Module) -> list[str]:
        """Make the model ready to train, in place; lines to say about it."""
        r = self.recipe
        unquantized = r.start == "loftq" or r.magnitude_from == "original"
        original = self.objective.load(r.dtype) if unquantized else None
        attach(model, self.objective.adapter(model), original=original)
        share = _share(*self.counts(model))
        report = verify(model, self.objective.example(model))
        if report.bypassed and r.idle_layers == "stop":
            shown = listed([f"{name} {reason}" for name, reason in report.bypassed.items()], 3)
            raise UserError(f"adapted layers that would not train: {shown}; leave them out (exclude), or set idle_layers: warn")
        return [f"{len(inspect(model).rows)} layers adapted, {share}", *report.notes, *report.problems]

    def counts(self, model: nn.Module) -> tuple[int, int]:
        """(trainable numbers, the base model's numbers)."""
        inspection = inspect(model)
        return inspection.trainable, inspection.total

    def zero_rows(self, model: nn.Module) -> int:
        """Rows (columns) without direction, which stay plain LoRA rows."""
        return sum(row.zero for row in inspect(model).rows)

    def settings(self) -> dict:
        """Settings of transformers' TrainingArguments beyond the recipe's."""
        return {}

    def tune(self, trainer) -> None:
        """Settings of the trainer itself."""
        ratios = ("magnitude_lr_ratio", "output_factor_lr_ratio", "whole_lr_ratio")
        for name in (*ratios, "magnitude_decay", "idle_layers", "check_base"):
            setattr(trainer, name, getattr(self.recipe, name))

    def save(self, model: nn.Module, folder: Path) -> list[str]:
        """Write the result; lines to say about it."""
        return self.objective.save(model, folder)

    def scored(self, model: nn.Module) -> nn.Module:
        """The model as it is scored: as the recipe's dtype has it."""
        return model

    def moved(self, model: nn.Module) -> Movement | None:
        """How far magnitude and direction moved; None where only the dense weights tell (doratune analyze)."""
        return measure(model)


class FullMethod(AdapterMethod):
    """Full fine-tuning."""

    result = "model"
    trainer = FullTrainer

    def __init__(self, recipe: TrainRecipe, objective: Objective):
        if recipe.dtype == "float16" and not torch.cuda.is_available():
            raise UserError("dtype is float16: full fine-tuning under autocast in float16 needs a GPU; set dtype: bfloat16")
        super().__init__(recipe, objective)

    def load(self, say: Callable[[str], None] = print) -> nn.Module:
        return self.objective.load("float32")

    def prepare(self, model: nn.Module) -> list[str]:
        model.requires_grad_(True).float()
        freeze_vision(model, self.recipe.visual())
        return [f"full fine-tuning, {_share(*self.counts(model))}"]

    def counts(self, model: nn.Module) -> tuple[int, int]:
        parameters = list(model.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def settings(self) -> dict:
        return {"bfloat16": {"bf16": True}, "float16": {"fp16": True}}.get(self.recipe.dtype, {})

    def tune(self, trainer) -> None:
        pass

    def save(self, model: nn.Module, folder: Path) -> list[str]:
        with whole_folder(folder, key="config.json") as temporary:
            with quiet_loading():
                model.save_pretrained(temporary)
            readable_by_both(temporary)
        return []

    def scored(self, model: nn.Module) -> nn.Module:
        return model.to(torch_dtype(self.recipe.dtype))

    def zero_rows(self, model: nn.Module) -> int:
        return 0

    def moved(self, model: nn.Module) -> None:
        return None


class BaselineMethod(AdapterMethod):
    """Series adapter, parallel adapter or prefix tuning."""

    trainer = BaselineTrainer

    def prepare(self, model: nn.Module) -> list[str]:
        baselines.attach(model, self.recipe.baseline())
        return [f"{self.recipe.method}, {_share(*self.counts(model))}"]

    def counts(self, model: nn.Module) -> tuple[int, int]:
        own = sum(p.numel() for p in baselines.parameters(model).values())
        return own, sum(p.numel() for p in model.parameters()) - own

    def tune(self, trainer) -> None:
        pass

    def save(self, model: nn.Module, folder: Path) -> list[str]:
        baselines.save(model, folder)
        return []

    def zero_rows(self, model: nn.Module) -> int:
        return 0

    def moved(self, model: nn.Module) -> None:
        return None


def method_of(recipe: TrainRecipe, objective: Objective | None = None) -> AdapterMethod:
    """The method that a checked recipe names, under its objective."""
    kinds = dict.fromkeys(METHODS, AdapterMethod) | dict.fromkeys(BASELINES, BaselineMethod) | {"full": FullMethod}
    return kinds[recipe.method](recipe, objective or objective_of(recipe))


def _share(trainable: int, total: int) -> str:
    return f"{trainable:,} trainable parameters ({100 * trainable / total:.2f} % of {total:,})"
