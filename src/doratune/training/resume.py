"""What a resumed run may change, and whether it has anything left to train.

Whatever shapes the training is what it was: the checkpoint holds the optimizer's groups with their rates, so another `lr` would
stand in recipe.yaml and not in the steps. Only what reports, scores or saves may differ (FREE), and under a constant schedule the
length: more epochs or steps then train on as a run of that length would have. Under another schedule the learning rate has
already come down along the old length.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from transformers.trainer_callback import TrainerState

from ..errors import UserError, listed
from ..support.yaml_text import as_read_back, read_yaml
from .recipe import TrainRecipe

FREE = (
    "output", "source", "expected", "mirror", "tasks", "tasks_protocol", "tasks_limit", "tasks_batch_size", "log_steps",
    "eval_steps", "save_steps", "keep_checkpoints", "tensorboard", "trust_remote_code", "check_base", "resume", "overwrite",
    "processes", "fsdp", "timeout", "workers", "best_by", "early_stopping", "sample_prompts", "sample_steps", "sample_tokens",
    "report_to", "device", "denoising_steps", "guidance", "features",
)  # fmt: skip
"""Settings that change nothing in what is trained."""

LENGTH = ("epochs", "max_steps")


def check_same(recipe: TrainRecipe, path: Path) -> None:
    """Raise for a setting in which a resumed run would differ from what it recorded; a setting of a newer version counts as its
    default.

    Raises:
        UserError: such a setting, with both values, or a record that cannot be read.
    """
    before = read_yaml(path)
    if not isinstance(before, dict):
        raise UserError(f"{path} holds no settings, so nobody knows what was trained; start a new run")
    before = as_read_back(dataclasses.asdict(TrainRecipe())) | before
    now = as_read_back(dataclasses.asdict(recipe))
    changed = [name for name in now if name not in FREE and before[name] != now[name]]
    shown = listed([f"{name} {before[name]!r} -> {now[name]!r}" for name in changed])
    if set(changed) - set(LENGTH):
        raise UserError(f"{path}: --resume with another {shown}; leave it as it was, or start a new run")
    if changed and (now["schedule"] != "constant" or _length(now) < _length(before)):
        raise UserError(
            f"{path}: --resume with another {shown}; only a longer run under schedule constant goes on (here {now['schedule']}): "
            "leave it as it was, or start a new run"
        )


def _length(settings: dict) -> tuple[float, float]:
    """How long a run is, to compare two of one data set: max_steps where there is one (it overrides epochs), else epochs."""
    steps = settings["max_steps"]
    return (steps, 0) if steps > 0 else (math.inf, settings["epochs"])


def already_trained(trainer, checkpoint: Path) -> bool:
    """Does the checkpoint hold the whole training? Then it is loaded: transformers would train one step too many."""
    arguments, state = trainer.args, TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    steps = arguments.max_steps
    if steps <= 0:
        updates = math.ceil(len(trainer.get_train_dataloader()) / arguments.gradient_accumulation_steps)
        steps = math.ceil(arguments.num_train_epochs * updates)
    if state.global_step < steps:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    if arguments.load_best_model_at_end and Path(state.best_model_checkpoint or "").is_dir():
        trainer._load_best_model()
    return True
