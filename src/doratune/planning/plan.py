"""A plan: the bytes of a training step on one device, term by term, and what follows from them.

    total = tensors at the step's largest moment (`step.py`) + the allocator's loss (`heap.py`) + the process itself

Under FSDP2, what a device holds of weights, adapters, gradients and optimizer is divided by the number of devices, and the
largest block is gathered twice (the one that computes and the next). Batches: a step's peak is the largest of a few linear
functions of the batch; the largest batch is extrapolated from two traces and confirmed by a third. Cost: a trace each.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch

from ..errors import UserError
from ..support.environment import memory_bytes
from .architecture import Architecture, architecture_of, stored_bytes
from .log import ADAPTERS, GRADIENTS, OPTIMIZER, TERMS, WEIGHTS
from .settings import PlanSettings
from .step import StepBytes, Untraceable, step_bytes
from .workloads import Workload, read_config, workload_of

ALLOCATOR, PROCESS, GATHERED, BUCKETS = "allocator", "process", "gathered", "buckets"
MEANING = TERMS | {
    GATHERED: "two whole blocks of a sharded model: the one that computes and the next",
    BUCKETS: "gradients on their way between the devices",
    ALLOCATOR: "free memory between blocks that is too small for the next",
    PROCESS: "the process without tensors",
}
DIVIDED = (WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER)
LEFT_OUT = ("forward", "backward", "activations, logits, temporaries")


@dataclass
class MemoryPlan:
    """What a run needs on each device."""

    settings: PlanSettings
    terms: dict[str, int]
    """Term → bytes at the largest moment."""
    capacity: int
    moment: str | None = None
    trained: int = 0
    uncounted: dict[str, str] = field(default_factory=dict)
    """Term → why it, or what of it, is not in the sum."""
    largest: int | None = None
    """The largest value of `settings.largest` that fits; 0: none."""
    change: str | None = None
    """Where it does not fit: the cheapest change of settings after which it does."""
    seconds: float | None = None
    batch: str = ""
    """What a forward pass reads, in words."""
    unit: str = "tokens"
    """What the time is counted by."""
    flops: int = 0
    """Floating-point operations of products in a forward and a backward pass on one device."""

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def fits(self) -> bool | None:
        """None: some term is not known, and the rest would fit."""
        if self.total > self.capacity:
            return False
        return None if self.uncounted else True

    def to_dict(self) -> dict:
        """Plain data."""
        own = ("moment", "trained", "uncounted", "largest", "change", "seconds", "flops", "terms", "capacity", "total", "fits")
        names = ("model", "method", "rank", "quantize", "batch_size", "max_length", "device", "processes", "fsdp", "checkpointing")
        return {name: getattr(self, name) for name in own} | {"settings": {name: getattr(self.settings, name) for name in names}}


class Planner:
    """Plans of one model; its config is read once, and a step that was traced is not traced again."""

    def __init__(self, settings: PlanSettings, config=None):
        settings.check()
        self.settings = settings
        self.config = config or read_config(settings)
        self.workload = workload_of(settings, self.config)
        """Of the plan that was traced last."""
        self.capacity = capacity_of(settings)
        self._steps: dict[tuple, tuple[StepBytes, dict[str, str], str]] = {}

    def plan(self) -> MemoryPlan:
        """The settings' plan, with the largest value that fits, or the change that makes it fit.

        Raises:
            UserError: the settings do not fit the model.
        """
        from .advice import cheapest_change, largest_that_fits

        settings, built = self.settings, architecture_of(self.settings, self.config)
        try:
            plan = self.of(settings, built)
        except Untraceable as error:
            plan = self._without_step(built, str(error))
            plan.seconds = duration(settings, self.workload)
            return plan
        plan.seconds = duration(settings, self.workload, plan.flops)
        if settings.largest != "none":
            plan.largest = largest_that_fits(self, settings, plan)
        if plan.fits is False:
            plan.change = cheapest_change(self)
        return plan

    def of(self, settings: PlanSettings, built: Architecture | None = None) -> MemoryPlan:
        """The terms of some settings of this model, alone."""
        key = tuple(str(value) for value in dataclasses.asdict(settings).values())
        if key not in self._steps:
            built = built or architecture_of(settings, self.config)
            answer = None if settings.answer_length is None else min(settings.answer_length, settings.max_length)
            each = -(-settings.batch_size // settings.processes)
            step = step_bytes(built, each, settings.max_length, answer, foreach=settings.on_gpu)
            self.workload = built.workload
            self._steps[key] = step, dict(built.uncounted), built.workload.shown(settings)
        step, uncounted, batch = self._steps[key]
        said = {"batch": batch, "unit": self.workload.unit, "flops": step.flops}
        terms = {**shared(step, settings), ALLOCATOR: step.heap - step.peak, PROCESS: settings.process_bytes}
        terms = {name: size for name, size in terms.items() if size}
        return MemoryPlan(settings, terms, self.capacity, step.moment, step.trained, uncounted, **said)

    def _without_step(self, built: Architecture, reason: str) -> MemoryPlan:
        """What can be said of a model whose step cannot be traced."""
        weights, adapters, trained = stored_bytes(built)
        terms = {WEIGHTS: weights, ADAPTERS: adapters, GRADIENTS: 4 * trained, PROCESS: self.settings.process_bytes}
        uncounted = {"activations, logits, temporaries": f"this model's step cannot be traced without its numbers ({reason})"}
        if self.settings.optimizer.startswith("adamw_torch"):
            terms[OPTIMIZER] = 8 * trained
        else:
            uncounted["optimizer"] = f"the state of {self.settings.optimizer} is not known without a step"
        terms, batch = divided(terms, self.settings), built.workload.shown(self.settings)
        return MemoryPlan(self.settings, terms, self.capacity, None, trained, uncounted, batch=batch, unit=self.workload.unit)


def shared(step: StepBytes, settings: PlanSettings) -> dict[str, int]:
    """The step's terms on one of several devices."""
    if settings.fsdp != "none":
        return divided(step.terms, settings) | {GATHERED: 2 * step.largest_block}
    return dict(step.terms) | ({BUCKETS: step.gradient_bytes} if settings.processes > 1 else {})


def divided(terms: dict[str, int], settings: PlanSettings) -> dict[str, int]:
    """The terms on a device where FSDP2 gives each its part, or keeps the parts on the CPU."""
    parts = {"none": lambda size: size, "shard": lambda size: -(-size // settings.processes), "offload": lambda size: 0}
    return {term: parts[settings.fsdp](size) if term in DIVIDED else size for term, size in terms.items()}


def capacity_of(settings: PlanSettings) -> int:
    """Bytes of one device.

    Raises:
        UserError: this machine's was asked for, and there is none.
    """
    if settings.memory:
        return int(settings.memory * 2**30)
    if settings.device == "cpu":
        return memory_bytes()
    if not torch.cuda.is_available():
        raise UserError("memory is 0, and this machine has no GPU to ask; give --memory GIB, or --device cpu")
    return torch.cuda.get_device_properties(0).total_memory


def duration(settings: PlanSettings, workload: Workload, flops: int = 0) -> float | None:
    """Seconds of the run; None where no throughput is given, or not how much there is to read.

    Args:
        flops: of a forward and a backward pass on one device.
    """
    units = math.inf
    if settings.max_steps > 0:
        units = settings.max_steps * settings.gradient_accumulation * workload.units(settings)
    if settings.tokens is not None:
        units = min(units, settings.epochs * settings.tokens)
    if units == math.inf or (settings.tokens_per_second is None and not (settings.tflops and flops)):
        return None
    if settings.tokens_per_second is not None:
        return units / (settings.tokens_per_second * settings.processes)
    return units / workload.units(settings) * flops / (settings.tflops * 1e12)
