"""A run that is watched: when it logs, evaluates, saves and stops, and which checkpoint it takes.

The best checkpoint and the early stop are transformers' own (`load_best_model_at_end`, EarlyStoppingCallback).
What comes here: figures at every step of a short run, and an evaluation and a checkpoint after the last step of any.
"""

from __future__ import annotations

import os
from pathlib import Path

from transformers import EarlyStoppingCallback, TrainerCallback

from .recipe import TrainRecipe
from .trackers import trackers_of

LOGS, MOST_STEPS = 20, 10
"""Lines of the log that a short run has at least, and steps between two at most."""


def watching_arguments(recipe: TrainRecipe, evaluated: bool) -> dict:
    """TrainingArguments of a recipe: what is logged, evaluated and saved when, and where the figures go.

    Args:
        evaluated: is there data to evaluate on?
    """
    every = {True: "epoch", False: "steps"}
    best = recipe.best_by != "none"
    save_steps = recipe.eval_steps if best else recipe.save_steps
    return {
        "logging_steps": recipe.log_steps or MOST_STEPS,
        "eval_strategy": every[recipe.eval_steps == 0] if evaluated else "no",
        "eval_steps": recipe.eval_steps or None,
        "save_strategy": every[save_steps == 0],
        "save_steps": save_steps or 500,
        "save_total_limit": recipe.keep_checkpoints + best,  # transformers would drop the last one for the best one
        "load_best_model_at_end": best,
        "metric_for_best_model": f"eval_{recipe.best_by}" if best else None,
        "greater_is_better": recipe.best_by == "token_accuracy",
        "report_to": trackers_of(recipe),
        "run_name": Path(os.path.abspath(recipe.output)).name,
    }


def watchers(recipe: TrainRecipe) -> list[TrainerCallback]:
    """What decides in a run when to log and when to stop."""
    callbacks: list[TrainerCallback] = [LogOften(recipe.log_steps), LastIsEvaluated()]
    if recipe.early_stopping:
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping))
    return callbacks


class LogOften(TrainerCallback):
    """Every so many steps, and at the last one of a run that is shorter; by 0, LOGS times, at least every MOST_STEPS steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        wanted = self.steps or min(MOST_STEPS, state.max_steps // LOGS)
        state.logging_steps = max(1, min(wanted, state.max_steps))


class LastIsEvaluated(TrainerCallback):
    """The last step is evaluated, whatever it is a multiple of, and saved where the best is looked for; by epochs it is anyway."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True
            control.should_save |= args.load_best_model_at_end
        return control
