"""One training run: recipe → data → attached model → Trainer → adapter folder, loss curve data and the movement line.

OUTPUT/recipe.yaml     the resolved recipe          OUTPUT/adapter/        the result (full fine-tuning: model/)
OUTPUT/metrics.json    losses, speed, movement      OUTPUT/checkpoint-N/   adapter, optimizer, state, for --resume
OUTPUT/loss.png        the curve (matplotlib)       OUTPUT/status.json     while it runs: where it is (doratune runs)

metrics.json is written last: a run without it is not finished. Of several processes, the first looks at the folder and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import OptimizerNames

from ..errors import UserError, near_misses
from ..layers.shares import sharded
from ..support.devices import device_of
from ..support.files import replacing
from ..support.models import contiguous_head
from ..support.outputs import refuse_inputs
from ..support.processes import agree, connect, is_first, launched, part_at_exit, refuse_strangers
from ..support.yaml_text import to_yaml
from .alarms import Alarms
from .base_blocks import whole_base
from .callbacks import Clock, StopOnSignal, TokenProgress, beside_the_bar
from .checkpoints import last_checkpoint
from .faults import restarted
from .folder import RECIPE, RunFolder
from .methods import AdapterMethod, method_of
from .objectives import objective_of
from .recipe import TrainRecipe, check_share
from .result import finish, measured
from .resume import already_trained, check_same
from .sharded import arguments as fsdp_arguments
from .status import RunStatus
from .trackers import ending_trackers, trackers_of, watch_trackers
from .watching import watchers, watching_arguments


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint was written."""

    def __init__(self, signal_number: int, checkpoint: str):
        super().__init__(f"stopped by signal {signal_number}; {checkpoint} is complete: go on with --resume")
        self.status = 128 + signal_number


def train(recipe: TrainRecipe, say=print, model=None, tokenizer=None, score=None, folder: RunFolder | None = None) -> dict:
    """Train as the recipe says and leave the run's folder behind.

    Args:
        say: takes each line of the report; model, tokenizer: use these instead of loading `recipe.model`.
        score: called with the trained model and the tokenizer before the run counts as finished; its `check`, where it has one,
            before the training.
        folder: of a caller that has begun it and finishes it, because the run is a part of what it does.

    Returns:
        The contents of metrics.json.

    Raises:
        UserError: a setting, the data or the model is not usable, or the loss stopped being finite.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written.
    """
    recipe.check()
    if recipe.optimizer not in (known := [name.value for name in OptimizerNames]):
        near = near_misses(recipe.optimizer, known)
        raise UserError(f"optimizer is {recipe.optimizer!r}; expected a name of transformers, such as adamw_torch{near}")
    trackers_of(recipe)
    recipe = restarted(recipe)
    device_of(recipe.device)
    connect(recipe.timeout, recipe.device)
    _check_share(recipe)
    say = say if is_first() else lambda line: None
    run = folder or RunFolder(recipe.output)
    checkpoint = agree(lambda: _starting_point(recipe, run, folder is None, say))
    objective = objective_of(recipe)
    tokenizer = tokenizer or objective.processor()
    counts: dict[str, dict[str, int]] = {}
    rows, eval_rows = objective.examples(tokenizer, say, counts)
    aside = beside_the_bar(say)
    watch = [Alarms(aside), *objective.watchers(tokenizer, aside, checkpoint)]
    set_seed(recipe.seed)
    method = method_of(recipe, objective)
    if model is not None and recipe.fsdp != "none":
        say(whole_base("the caller loaded it"))
    model = model or method.load(say)
    for note in objective.compare(model, tokenizer, rows, eval_rows):
        say(note)
    if hasattr(score, "check"):
        score.check(model, tokenizer)
    for note in method.prepare(model):
        say(note)
    rows = objective.arranged(rows, model, tokenizer, say)
    agree(lambda: _begin(recipe, run, folder is None))
    trainer, clock = build_trainer(method, model, tokenizer, rows, eval_rows, checkpoint, watch)
    _say_engine(trainer, recipe, say)
    watch_trackers(trainer, aside)
    with RunStatus(run.output) as status, ending_trackers(trainer):
        trainer.add_callback(status)
        _train_to_the_end(trainer, model, checkpoint)
        metrics = _leave(method, trainer, clock, model, tokenizer, counts, say, score)
    if folder is None and is_first():
        run.finish()
    return metrics


def _say_engine(trainer, recipe: TrainRecipe, say) -> None:
    if (count := launched()[1]) > 1:
        engine = "FSDP2" if trainer.is_fsdp_enabled else "DDP"
        say(f"{count} processes, {engine}: each takes {recipe.batch_size // count} of the {recipe.batch_size} examples of a batch")


def _leave(method: AdapterMethod, trainer, clock: Clock, model, tokenizer, counts: dict, say, score) -> dict:
    """Write what the run leaves behind; the contents of metrics.json, nothing in the other processes. Those take part where the
    model is in shards."""
    folder = Path(method.recipe.output) / method.result
    if not is_first() and not sharded(model):
        return {}
    notes = method.save(model, folder)
    if not is_first():
        measured(method, model)
        return {}
    for note in notes:
        say(note)
    method.objective.leave(tokenizer, folder)
    if score is not None:
        score(method.scored(model), tokenizer)
    return finish(method, trainer, clock, model, counts, say)


def _train_to_the_end(trainer: Trainer, model, checkpoint: Path | None) -> None:
    """All steps, and the evaluation after the last of them; the model is left in evaluation mode."""
    bar = TokenProgress(trainer.unit)
    trainer.add_callback(bar)
    with StopOnSignal() as stop, contiguous_head(model), contextlib.closing(bar):
        trainer.add_callback(stop)
        if not (checkpoint and already_trained(trainer, checkpoint)):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    part_at_exit()
    if stop.received is not None:
        raise Interrupted(stop.received, str(last_checkpoint(Path(trainer.args.output_dir))))
    evaluated = any("eval_loss" in row and row["step"] == trainer.state.global_step for row in trainer.state.log_history)
    if trainer.eval_dataset and not evaluated and not trainer.args.load_best_model_at_end:
        trainer.evaluate()
    model.eval()


def _check_share(recipe: TrainRecipe) -> None:
    """Every process takes an equal part of each batch."""
    count = launched()[1]
    check_share(recipe.batch_size, count)
    if recipe.fsdp != "none" and count == 1:
        raise UserError(f"fsdp is {recipe.fsdp!r}, but there is one process; give processes: 2 or more, or start it with torchrun")


def _starting_point(recipe: TrainRecipe, run: RunFolder, own: bool, say) -> Path | None:
    """The checkpoint to resume from, None for a new run; what is in the way is found here."""
    if own:
        data = {"the data": recipe.data, "the evaluation data": recipe.eval_data, "the class's images": recipe.class_images}
        refuse_inputs(run.output, {"the model": recipe.model} | data)
    if not recipe.resume:
        if own:
            run.check(recipe.overwrite)
        return None
    if own:
        run.restore()
    checkpoint = last_checkpoint(run.output, say)
    if checkpoint is None:
        before = f"; the run before it is in {run.aside}" if run.aside.is_dir() else ""
        raise UserError(f"{run.output} holds no complete checkpoint to resume from; run without --resume{before}")
    check_same(recipe, run.output / RECIPE)
    return checkpoint


def _begin(recipe: TrainRecipe, run: RunFolder, own: bool) -> None:
    if own and not recipe.resume:
        run.begin()
    (run.output / "metrics.json").unlink(missing_ok=True)  # unfinished from here on
    write_recipe(run.output / RECIPE, recipe)


def build_trainer(
    method: AdapterMethod, model, tokenizer, rows, eval_rows, checkpoint: Path | None, watch: Sequence[TrainerCallback] = ()
) -> tuple[Trainer, Clock]:
    """The method's Trainer with our clock, what the recipe watches the run by, and further callbacks."""
    recipe, objective = method.recipe, method.objective
    if recipe.checkpointing != "none":
        model.enable_input_require_grads()
    arguments = TrainingArguments(
        output_dir=recipe.output,
        per_device_train_batch_size=recipe.batch_size // launched()[1],
        per_device_eval_batch_size=recipe.batch_size // launched()[1],
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
        warmup_steps=recipe.warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        seed=recipe.seed,
        logging_nan_inf_filter=False,
        **watching_arguments(recipe, bool(eval_rows)),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=device_of(recipe.device).type == "cpu",
        disable_tqdm=False,
        accelerator_config={"dispatch_batches": False},  # it would cut streamed batches, whose values have several lengths
        **checkpointing_arguments(recipe.checkpointing),
        **fsdp_arguments(recipe.fsdp),
        **objective.arguments(),
        **method.settings(),
    )
    refuse_strangers(arguments.world_size)
    clock = Clock(checkpoint)
    trainer = method.trainer(
        model,
        arguments,
        data_collator=objective.collator(model, tokenizer),
        train_dataset=rows,
        eval_dataset=eval_rows or None,
        callbacks=[clock, *watchers(recipe), *watch],
        **objective.trainer_settings(),
    )
    trainer.unit, trainer.units_in, trainer.figures = objective.unit, objective.units_in, objective.figures
    refuse_strangers(trainer.accelerator.num_processes)
    method.tune(trainer)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def checkpointing_arguments(kind: str) -> dict:
    """TrainingArguments for gradient checkpointing; transformers 5 renamed them on its way."""
    if kind == "none":
        return {}
    renamed = any(f.name == "activation_checkpointing" for f in dataclasses.fields(TrainingArguments))
    prefix = "activation" if renamed else "gradient"
    return {f"{prefix}_checkpointing": True, f"{prefix}_checkpointing_kwargs": {"use_reentrant": kind == "reentrant"}}


def write_recipe(path: Path, recipe: TrainRecipe) -> None:
    """The resolved recipe as YAML."""
    with replacing(path) as temporary:
        temporary.write_text(to_yaml(dataclasses.asdict(recipe)), encoding="utf-8")
