"""What a run leaves behind beside its adapter: metrics.json, written last, the picture of its loss, the card of its result."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import Trainer

from ..publishing.card import write_training_card
from ..support.environment import environment
from ..support.files import write_json
from .alarms import last_warning
from .callbacks import Clock
from .examples import count_of, streamed_counts
from .methods import AdapterMethod
from .plots import PLOT, plot_loss
from .recipe import TrainRecipe


def measured(method: AdapterMethod, model) -> tuple:
    """(how far the adapter moved, (trainable numbers, all of the base's), rows without direction); of shards by every process."""
    return method.moved(model), method.counts(model), method.zero_rows(model)


def finish(method: AdapterMethod, trainer, clock: Clock, model, counts: dict, say) -> dict:
    """Write metrics.json and say how far the adapter moved."""
    output, log = Path(method.recipe.output), trainer.state.log_history
    moved, (trainable, total), zero_rows = measured(method, model)
    if moved is not None:
        say(str(moved))
    warning = last_warning(moved, log, trainer.state.global_step, method.recipe.lr)
    if warning is not None:
        say(f"warning: {warning}")

    def last(key: str) -> float | None:
        return next((row[key] for row in reversed(log) if key in row), None)

    metrics = {
        "method": method.recipe.method,
        "trainable": trainable,
        "total": total,
        "zero_rows": zero_rows,
        "examples": count_of(trainer.train_dataset),
        "data": counts | streamed_counts(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "final_loss": last("train_loss") if last("loss") is None else last("loss"),
        **_evaluated(trainer),
        **clock.spent,
        "unit": trainer.unit,
        "tokens_per_second": clock.spent["tokens"] / max(clock.spent["seconds"], 1e-9),
        "peak_bytes": clock.peak_bytes,
        "moved": None if moved is None else str(moved),
        "magnitude_moved": None if moved is None else moved.magnitude,
        "direction_moved": None if moved is None else moved.direction,
        "warning": warning,
        "environment": environment(),
        "samples": [sample for one in trainer.callback_handler.callbacks for sample in getattr(one, "samples", [])],
        "log": [row for row in log if "loss" in row or "eval_loss" in row],
    }
    write_training_card(output / method.result, dataclasses.asdict(method.recipe), dataclasses.asdict(TrainRecipe()), metrics)
    plot_loss(metrics["log"], output / PLOT)
    write_json(output / "metrics.json", metrics)
    speed = f"{metrics['tokens_per_second']:.0f} {trainer.unit}/s" + " without padding" * (trainer.unit == "tokens")
    say(f"{method.result} written to {output / method.result} ({speed})")
    return metrics


def _evaluated(trainer: Trainer) -> dict:
    """Figures of the evaluation data: of the best checkpoint where that is what the run takes, else the last ones."""
    state, best = trainer.state, trainer.args.load_best_model_at_end and trainer.state.best_global_step
    rows = [row for row in state.log_history if "eval_loss" in row and (not best or row["step"] == best)]
    row = rows[-1] if rows else {}
    return {"eval_loss": row.get("eval_loss"), "eval_token_accuracy": row.get("eval_token_accuracy"), "best_step": best or None}
