"""TrainerMixin: what transformers' Trainer and TRL's trainers need to train an attached model well.

    class DoRATrainer(TrainerMixin, transformers.Trainer): ...
    class DoRASFT(TrainerMixin, trl.SFTTrainer): ...

The plain classes train an attached model as it should be: m does not decay, a quantized base is accepted, checkpoints hold the
adapter and are resumed from. What comes here: rates of their own for m and B, checkpoints without a second copy of the adapter, a
stop at the first loss that is not finite or at layers that do not train, length-grouped batches that are the same after a resume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from .. import baselines
from ..adapter.attach import record_of
from ..adapter.groups import parameter_groups
from ..adapter.states import refuse_merged
from ..adapter.statistics import hold_statistics
from ..checkpoint.adapter import load_weights, save
from ..data.packing import without_mask
from ..errors import UserError
from ..layers.shares import sharded
from ..support.models import quiet_loading
from .callbacks import EpochOrder
from .checkpoints import STATE, damage, remove_old, whole_checkpoint
from .faults import refuse_spoiled_steps
from .half import scale_loss
from .idle import IdleWatch
from .movement import magnitude_moved
from .rng import load_rng_state
from .sharded import finite, load_optimizer, put_back, save_optimizer, take_engine, trained_shares
from .token_loss import TokenLoss


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite; the last checkpoint is the last good state."""


class SteadyMixin:
    """What every run here wants of a Trainer, whatever it trains: a stop at the first loss that is not finite, checkpoints that are
    complete in one act, length-grouped batches that are the same after a resume, an evaluation loss over tokens, and a scaled loss
    over an fp16 base."""

    _stage: Path | None = None
    """Where a checkpoint is being written."""
    _shares: Sequence[list[torch.Tensor]] = ()  # the optimizer's parameters, of a model that was in shards before
    _token_loss: TokenLoss | None = None
    shards = False  # can it save a model in shards?
    unit = "tokens"
    """What the run's speed is counted in."""
    units_in: Callable[[dict], int | None] = staticmethod(lambda inputs: None)
    """Units in a batch, where transformers does not count them itself."""
    figures: Callable[[], dict[str, float]] = staticmethod(dict)
    """Further figures of a line of the log, since the line before."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        scale_loss(self.accelerator, self.model)
        self.add_callback(EpochOrder())

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        take_engine(self, self.shards)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        self._token_loss = TokenLoss()
        try:
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
            means = {"loss": self._token_loss.mean(), "token_accuracy": self._token_loss.accuracy()}
        finally:
            self._token_loss = None
        if f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items() if mean is not None})
        return output

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs = without_mask(inputs)
        if self._token_loss is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        labels = inputs.get("labels")
        own = kwargs | {"num_items_in_batch": None}  # the mean of this process's batch, not its share of all processes' tokens
        result = super().compute_loss(model, inputs, return_outputs, **own)
        loss, outputs = result if return_outputs else (result, None)
        self._token_loss.add(loss, outputs, labels, self.accelerator.gather_for_metrics)
        return result

    def training_step(self, model, inputs, *args, **kwargs):
        units = self.units_in(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.state.num_input_tokens_seen += (units or 0) * self.args.world_size  # every process has an equal share
        if not torch.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; training stopped before it could spoil the "
                "run: lower the learning rate or look at the data, then --resume from the last checkpoint"
            )
        return loss

    def log(self, logs, *args, **kwargs):
        super().log(logs | self.figures() if "loss" in logs else logs, *args, **kwargs)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Transformers makes it when the optimizer is there, wherever that came from."""
        put_back(self, self._shares)
        refuse_spoiled_steps(self)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model, trial=None):
        if not finite(p for p in self.model.parameters() if p.requires_grad):
            raise NonFiniteLoss(
                f"the trained parameters hold NaN or infinite values after step {self.state.global_step}; nothing was saved over "
                "the last good checkpoint: lower the learning rate, then --resume"
            )
        for one in self.callback_handler.callbacks:  # one that the run before a resume had not
            if isinstance(one, ExportableState):
                self.state.stateful_callbacks.setdefault(type(one).__name__, one.state())
        target = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with whole_checkpoint(target, self.args.should_save) as stage, quiet_loading():
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._stage = None
            if self.args.should_save and Path(self.state.best_model_checkpoint or "").parent == stage:
                self.state.best_model_checkpoint = str(target)
                self.state.save_to_json(str(stage / target.name / STATE))
        if self.args.should_save:
            remove_old(target, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(target))

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._stage is None else str(self._stage)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Not while it is being written."""

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _readable(checkpoint):
            if not load_optimizer(self, checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not save_optimizer(self, output_dir):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_rng_state(self, checkpoint):
        with _readable(checkpoint):
            load_rng_state(self.args, checkpoint, super()._load_rng_state)

    def _get_train_sampler(self, train_dataset=None):
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if hasattr(dataset, "order"):  # data with an order of their own
            return dataset.order(self.args.train_batch_size, self.args.data_seed or self.args.seed)
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__"):
            column = self.args.length_column_name
            lengths = [row[column] if column in row else len(row["input_ids"]) for row in dataset]
            size = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            return EpochLengthSampler(size, lengths, self.args.data_seed or self.args.seed)
        return super()._get_train_sampler(train_dataset)


class TrainerMixin(SteadyMixin):
    """In front of transformers.Trainer or a subclass of it; the model must be attached already."""

    shards = True
    magnitude_lr_ratio: float = 1.0
    """Learning rate of m as a multiple of the trainer's."""
    output_factor_lr_ratio: float = 1.0
    """LoRA+: learning rate of B over that of A."""
    magnitude_decay: float = 0.0
    """Weight decay of δ in m = m₀·exp(δ)."""
    whole_lr_ratio: float = 1.0
    """Learning rate of the modules that are trained whole (also_train) as a multiple of the trainer's."""
    check_base: bool = True
    """Is a checkpoint of another base refused when the training is resumed?"""
    idle_layers: str = "stop"
    """What happens at adapted layers that do not train (`idle.py`): stop, or warn."""

    def __init__(self, model=None, *args, **kwargs):
        refuse_merged(record_of(model), "training")
        super().__init__(model, *args, **kwargs)
        self._idle = IdleWatch(self)
        self.add_callback(self._idle)

    def compute_loss(self, *args, **kwargs):
        hold_statistics(self.model)
        with self._idle.forward() if self.model.training else contextlib.nullcontext():
            return super().compute_loss(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._idle.after_backward()
        return loss

    def log(self, logs, *args, **kwargs):
        """A line with a loss says how far m has moved, too: in the log, the progress and the trackers."""
        moved = magnitude_moved(self.model) if "loss" in logs else None
        super().log(logs if moved is None else logs | {"magnitude_moved": moved}, *args, **kwargs)

    def create_optimizer(self, model=None):
        """The trainer's own optimizer class over our parameter groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(
                self.accelerator.unwrap_model(model, keep_torch_compile=False),
                self.args.learning_rate,
                self.args.weight_decay,
                self.magnitude_lr_ratio,
                self.output_factor_lr_ratio,
                self.magnitude_decay,
                self.whole_lr_ratio,
            )
            cls, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            settings = {k: v for k, v in settings.items() if k not in ("params", "model", "optimizer_dict")}
            self.optimizer = cls(groups, **settings)
        self._shares = trained_shares(self)
        return self.optimizer

    def save_model(self, output_dir=None, _internal_call=False):
        if not sharded(self.model):
            return super().save_model(output_dir, _internal_call)
        return self._save(output_dir)

    def _save(self, output_dir=None, state_dict=None):
        """The adapter alone, and the tokenizer; of a model in shards every process takes part."""
        if not self.args.should_save and not sharded(self.model):
            return
        folder = Path(output_dir or self.args.output_dir)
        save(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), folder)
        if self.processing_class is not None and self.args.should_save:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        plain = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        load_weights(plain, resume_from_checkpoint, self.check_base)

    def _load_best_model(self):
        plain = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        load_weights(plain, self.state.best_model_checkpoint, check_base=False)  # this run's own


class FullTrainer(SteadyMixin, transformers.Trainer):
    """transformers.Trainer for full fine-tuning: all weights, checkpoints of the whole model."""


class BaselineTrainer(SteadyMixin, transformers.Trainer):
    """transformers.Trainer for series, parallel and prefix; checkpoints of what they train alone."""

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            baselines.save(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        baselines.load_weights(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class DoRATrainer(TrainerMixin, transformers.Trainer):
    """transformers.Trainer for an attached model."""


class EpochLengthSampler(LengthGroupedSampler):
    """Length-grouped order that depends on seed and epoch only: a resumed run sees the batches it would have seen."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


@contextlib.contextmanager
def _readable(checkpoint):
    """A damaged checkpoint as one line, where a Trainer is resumed without `last_checkpoint`."""
    try:
        yield
    except Exception as error:
        if checkpoint is None or (problem := damage(Path(checkpoint))) is None:
            raise
        raise UserError(f"{checkpoint} cannot be resumed from: {problem}; resume from another checkpoint") from error
