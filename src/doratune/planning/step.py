"""One training step, counted: forward, loss, backward, clipping and the optimizer's step of a recipe under fake tensors.

The same model code runs as in training (attention, rotary tables, the loss of transformers, gradient checkpointing, autocast, the
recipe's optimizer), at full depth and with the very shapes, so that nothing is assumed about an architecture. The optimizer steps
first, so that its state is there in the forward and the backward. Source: torch's FakeTensorMode. Cost: about a second for each ten
layers, no memory.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..adapter.statistics import hold_statistics
from ..config import METHODS
from ..errors import UserError
from ..support.models import contiguous_head, torch_dtype
from ..training.train import checkpointing_arguments
from .architecture import Architecture, traced_model
from .heap import heap_bytes
from .log import ADAPTERS, FACTORS, GRADIENTS, IMAGES, OPTIMIZER, WEIGHTS, AllocationLog
from .stand_ins import Adapter
from .whole_numbers import WholeNumbers


@dataclass
class StepBytes:
    """Bytes of one steady training step on one device."""

    terms: dict[str, int]
    """Term → bytes at the step's largest moment."""
    moment: str
    """In which phase that is: step, forward, backward, or what the workload does between steps."""
    phases: dict[str, int]
    """Phase → its peak."""
    trained: int
    """Numbers that are trained."""
    gradient_bytes: int
    heap: int
    """What an allocator holds for it, over several steps."""
    largest_block: int
    """Bytes of the largest module that repeats: what a sharded model gathers at once."""
    flops: int
    """Floating-point operations of a forward and a backward pass."""

    @property
    def peak(self) -> int:
        return sum(self.terms.values())


def step_bytes(built: Architecture, batch: int, length: int, answer: int | None = None, foreach: bool = False) -> StepBytes:
    """Trace a step of `batch` examples, of `length` tokens where they have a length.

    Args:
        answer: positions whose logits are computed; None: all.
        foreach: does the optimizer step all parameters at once, as PyTorch's do on GPUs?

    Raises:
        Untraceable: the model's code asks for numbers, or an operation has no shapes of its own.
    """
    plain = functools.partial(FakeTensorMode, shape_env=ShapeEnv(allow_scalar_outputs=True), allow_non_fake_inputs=True)
    try:
        model = copy.deepcopy(built.model)
        with WholeNumbers() if built.workload.whole_numbers else plain():
            return _traced(built, traced_model(built, model), batch, length, answer, foreach)
    except UserError:
        raise
    except Exception as error:  # the code of any architecture
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:160]
        raise Untraceable(f"{type(error).__name__}: {reason}") from error


class Untraceable(UserError):
    """A model whose step cannot be traced without numbers, with the reason."""


def _traced(built: Architecture, model: nn.Module, batch: int, length: int, answer: int | None, foreach: bool) -> StepBytes:
    recipe = built.recipe
    if recipe.checkpointing != "none":
        model.enable_input_require_grads()
        settings = checkpointing_arguments(recipe.checkpointing)
        model.gradient_checkpointing_enable(next(value for value in settings.values() if isinstance(value, dict)))
    built.workload.prepare(model)
    if recipe.method in METHODS:
        hold_statistics(model)
    log = AllocationLog(*built.workload.scores(model, batch, length, answer))
    name_parts(log, model, built)
    beside = torch.empty(built.workload.bytes_beside(), dtype=torch.uint8)
    log.own(beside, WEIGHTS)
    optimizer = optimizer_of(recipe, model, foreach)
    inputs, forward = built.workload.inputs(model, batch, length, answer), wrapped_forward(model, recipe)
    for t in inputs.values():
        if isinstance(t, torch.Tensor) and t.numel() > batch * length:  # images and masks
            log.own(t, IMAGES)
    trained = [p for p in model.parameters() if p.requires_grad]
    marks: dict[str, tuple[int, int]] = {}

    @contextlib.contextmanager
    def phase(name: str):
        start = log.operations
        yield
        marks[name] = start, log.operations

    with log, contiguous_head(model):
        _ready_gradients(log, trained)
        with phase("step"):
            if recipe.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
            optimizer.step()
            for t in (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)):
                log.own(t, OPTIMIZER)
        optimizer.zero_grad()
        if recipe.gradient_accumulation > 1:
            _ready_gradients(log, trained)
        with phase("forward"), autocast(recipe):
            loss = built.workload.loss(forward, inputs)
        log.keep()
        with phase("backward"):
            loss.backward()
            del loss
        flops = log.flops
        if built.workload.between_steps:
            optimizer.zero_grad()
            with phase(built.workload.between_steps), torch.no_grad():
                built.workload.work_between_steps()
    return summary(log, marks, model, flops)


def _ready_gradients(log: AllocationLog, trained: list[nn.Parameter]) -> None:
    """Gradients as a backward leaves them."""
    for p in trained:
        p.grad = torch.empty_like(p)
        log.own(p.grad, GRADIENTS)


def summary(log: AllocationLog, marks: dict, model: nn.Module, flops: int) -> StepBytes:
    """The peaks of the last step."""
    peaks = {phase: log.peak(*mark) for phase, mark in marks.items()}
    moment = max(peaks, key=lambda phase: peaks[phase][0])
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    largest = max((_bytes(inner) for block in blocks for inner in block), default=0)
    return StepBytes(
        terms=peaks[moment][1],
        moment=moment,
        phases={phase: peak for phase, (peak, _) in peaks.items()},
        trained=sum(p.numel() for p in trained),
        gradient_bytes=sum(p.nbytes for p in trained),
        heap=max(heap_bytes(log.storages), peaks[moment][0]),
        largest_block=largest,
        flops=flops,
    )


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def name_parts(log: AllocationLog, model: nn.Module, built: Architecture) -> None:
    """Say of every parameter and buffer what it is for, and of every gradient once it is there."""
    for t in (*model.parameters(), *model.buffers()):
        log.own(t, WEIGHTS if built.full or not t.requires_grad else ADAPTERS)
    for module in model.modules():
        if isinstance(module, Adapter):
            for t in (t for t in module.factors.values() if t is not None):
                log.own(t, FACTORS)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: log.own(p.grad, GRADIENTS))


def optimizer_of(recipe, model: nn.Module, foreach: bool) -> torch.optim.Optimizer:
    """The recipe's optimizer over what is trained."""
    from transformers import Trainer, TrainingArguments

    settings = {"optim": recipe.optimizer, "learning_rate": recipe.lr, "use_cpu": True, "report_to": []}
    arguments = TrainingArguments(output_dir=recipe.output, **settings)
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer = cls([p for p in model.parameters() if p.requires_grad], **settings)
    for group in optimizer.param_groups:
        if foreach and "foreach" in group and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def autocast(recipe):
    """What `doratune train` runs full fine-tuning under."""
    if recipe.method != "full" or recipe.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch_dtype(recipe.dtype))


def wrapped_forward(model: nn.Module, recipe):
    """The model's forward; under autocast accelerate turns its outputs into float32."""
    if recipe.method != "full" or recipe.dtype == "float32":
        return model
    from accelerate.utils import convert_outputs_to_fp32

    return convert_outputs_to_fp32(model.forward)
