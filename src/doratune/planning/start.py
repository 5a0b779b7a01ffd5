"""doratune init: settings that fit a model, its data and a device, each with its reason.

What is adapted, at which rank and learning rate, comes from the paper or from our own runs (docs/evidence.md); what fits is asked
of the plan (`plan.py`, `advice.py`), so that there is one figure for a run's memory. Cost: a trace for each change that is tried,
about a second for each ten layers.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..data.limits import positions_of
from ..errors import UserError
from ..support.image_text import parts_of
from .advice import first_fit, largest_rank
from .architecture import Architecture, architecture_of, stored_bytes
from .configs import config_of
from .plan import MemoryPlan, Planner, capacity_of
from .settings import PlanSettings
from .step import Untraceable
from .workloads import workload_of

RESERVE = 0.15
"""Share of the memory that a plan leaves free here: what plans missed at most against measured runs (docs/planning.md)."""
STEP_EXAMPLES, FEWEST_STEPS = 16, 50
"""Examples an optimizer step, and the steps below which a step takes fewer."""
SMALL, LARGE = 1e9, 7.5e9
"""Numbers of a base from which the paper's learning rate holds, and from which that of its LLaMA3-8B runs does."""
RATES = (
    (SMALL, 3e-4, "below 1B: our sweep on SmolLM2-135M, the lowest evaluation loss of 1e-4, 3e-4, 1e-3, 3e-3 (docs/evidence.md)"),
    (LARGE, 2e-4, "1B to 7B: the paper's rate for DoRA (commonsense runs, LLaMA-7B at rank 16, LLaMA2-7B)"),
    (math.inf, 1e-4, "from 8B: the paper's rate for LLaMA3-8B"),
)


class Chosen(NamedTuple):
    """A setting of a recipe, and why it has this value."""

    value: Any
    reason: str


@dataclass(frozen=True)
class DataFacts:
    """What a start needs to know of the data; lengths in tokens.

    Attributes:
        usual: the length that 99 % of the examples do not exceed. divided: are they parts of texts, of `usual` tokens each?
        images: most images in an example.
    """

    examples: int
    usual: int
    longest: int
    divided: bool = False
    images: int = 0


@dataclass(frozen=True)
class RunWish:
    """What a user says of the run.

    Attributes:
        memory: of each device in GiB; 0: this machine's. device: cuda or cpu. quantize: auto, or how the base is stored.
        max_length: tokens; None: by the data.
    """

    model: str
    memory: float = 0.0
    device: str = "cuda"
    quantize: str = "auto"
    processes: int = 1
    max_length: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Start:
    """Settings in the order of a recipe, and the plan of the run with them."""

    choices: dict[str, Chosen]
    plan: MemoryPlan
    memory: float
    """GiB of each device."""


def start_of(wish: RunWish, facts: DataFacts, config=None) -> Start:
    """Settings that fit.

    Args:
        config: the model's, where it is at hand.

    Raises:
        UserError: no such model, or the memory is too small for it, with what would help.
    """
    config = config or config_of(wish.model, wish.trust_remote_code)
    memory = capacity_of(PlanSettings(model=wish.model, memory=wish.memory, device=wish.device)) / 2**30
    length = _length(wish, facts, config)
    epochs = _epochs(facts)
    together = _examples_a_step(facts, epochs.value, wish.processes)
    largest = _largest_run(wish, memory, together.value, max_length=length.value, **_images(wish, facts, config))
    planner = Planner(largest, config)
    planner.settings = largest = dataclasses.replace(largest, rank=min(largest.rank, largest_rank(planner, largest)))
    built = architecture_of(largest, config)
    plan = fitting(planner, wish, memory)
    choices = (
        _adapter(largest) | _of_parts(built) | _rates(sum(p.numel() for p in built.model.parameters()), facts, epochs, together)
    )
    return Start(choices | _sizes(plan, wish, memory, together, length, stored_bytes(built)[0]), plan, memory)


def _largest_run(wish: RunWish, memory: float, together: int, **more) -> PlanSettings:
    """All examples of a step at once, nothing recomputed, nothing quantized unless asked for."""
    return PlanSettings(
        model=wish.model,
        device=wish.device,
        memory=memory * (1 - RESERVE),
        quantize="none" if wish.quantize == "auto" else wish.quantize,
        processes=wish.processes,
        fsdp="shard" if wish.processes > 1 else "none",
        batch_size=together,
        trust_remote_code=wish.trust_remote_code,
        largest="none",
        **more,
    )


def _images(wish: RunWish, facts: DataFacts, config) -> dict:
    """Settings of a model that reads images too: LLaVA's script trains its projector whole, at a tenth of the adapter's rate."""
    probe = PlanSettings(model=wish.model, trust_remote_code=wish.trust_remote_code)
    workload = workload_of(probe, copy.deepcopy(config))
    if "image_count" not in workload.uses:
        return {}
    parts = parts_of(workload.skeleton())
    projector = {"projector": "whole", "whole_lr_ratio": 0.1} if parts and parts.projector else {}
    return {"image_count": facts.images} | projector


def _of_parts(built: Architecture) -> dict[str, Chosen]:
    """What is trained beside the language model of a model that reads images."""
    recipe, parts = built.recipe, parts_of(built.model)
    if parts is None:
        return {}
    choices = {
        "vision_tower": Chosen(recipe.vision_tower, "adapters on the language model alone, as in LLaVA's instruction tuning")
    }
    if recipe.projector == "whole":
        choices["projector"] = Chosen(recipe.projector, "what lies between image tower and language model, as in LLaVA's script")
        choices["whole_lr_ratio"] = Chosen(recipe.whole_lr_ratio, "the projector's rate over lr, as in LLaVA's script")
    return choices


def _length(wish: RunWish, facts: DataFacts, config) -> Chosen:
    most = positions_of(config)
    wanted = wish.max_length or max(64, 64 * math.ceil(facts.usual / 64))
    reason = f"99 % of the examples have at most {facts.usual} tokens, the longest {facts.longest}"
    reason = f"texts of up to {facts.longest} tokens become examples of this length" if facts.divided else reason
    reason = "as asked for" if wish.max_length else reason
    if most is not None and wanted > most:
        return Chosen(most, f"{reason}; the model has {most} positions")
    return Chosen(wanted, reason)


def _epochs(facts: DataFacts) -> Chosen:
    if facts.examples >= 10_000:
        return Chosen(1, "the paper's instruction tuning reads its 10,000 examples once (Table 11)")
    return Chosen(3, "the paper's commonsense runs read their data three times; eval_size shows whether that is too often")


def _examples_a_step(facts: DataFacts, epochs: int, processes: int) -> Chosen:
    """Examples that one optimizer step learns from."""
    count = STEP_EXAMPLES
    while count > 4 and facts.examples * epochs / count < FEWEST_STEPS:
        count //= 2
    count = max(count, processes)
    count += -count % processes
    if count > STEP_EXAMPLES:
        return Chosen(count, "one example for each process")
    few = f"fewer than the paper's 16, so that there are {FEWEST_STEPS} steps"
    return Chosen(count, "the paper's 16 examples a step" if count == STEP_EXAMPLES else few)


def fitting(planner: Planner, wish: RunWish, memory: float) -> MemoryPlan:
    """The plan of the first change that fits, of those that leave the data and a quantization that was asked for alone."""
    asked = planner.settings

    def allowed(settings: PlanSettings) -> bool:
        packs = wish.quantize == "auto" and settings.fsdp == "none"  # packed weights in shards are not tested
        return settings.max_length == asked.max_length and (packs or settings.quantize == asked.quantize)

    try:
        fit = first_fit(planner, allowed)
    except Untraceable:
        careful = dataclasses.replace(_least(planner, wish, asked.max_length), quantize=asked.quantize)
        plan = Planner(careful, planner.config).plan()
        fit = None if plan.fits is False else ("", plan)
    if fit is None:
        raise UserError(_too_small(planner, wish, memory))
    return fit[1]


def _least(planner: Planner, wish: RunWish, length: int) -> PlanSettings:
    """The settings that take the least memory: one example on each device, everything recomputed, the base in 4 bits."""
    asked = planner.settings
    return dataclasses.replace(
        asked,
        batch_size=asked.processes,
        gradient_accumulation=asked.batch_size // asked.processes,
        checkpointing="non-reentrant" if planner.workload.can_checkpoint else "none",
        quantize="nf4" if wish.quantize == "auto" and asked.fsdp == "none" else asked.quantize,
        max_length=length,
    )


def _too_small(planner: Planner, wish: RunWish, memory: float) -> str:
    """What is said of a memory that nothing fits in, with the cheapest change after which something does."""
    least = _least(planner, wish, planner.settings.max_length)
    used = planner.capacity / 2**30 / memory

    def needed(settings: PlanSettings) -> float:
        return math.ceil(100 * planner.of(settings).total / 2**30 / used) / 100

    try:
        figure = needed(least)
        dense = least.quantize == "none" and least.fsdp == "none"
        ways = [("--quantize nf4", dataclasses.replace(least, quantize="nf4"))] if dense else []
        short = max(64, least.max_length // 4)
        ways += (
            [(f"--max_length {short}", dataclasses.replace(least, max_length=short))]
            if planner.workload.least_length < short < least.max_length
            else []
        )
        way = next((f"{words}, or " for words, settings in ways if needed(settings) <= memory), "")
    except Untraceable:
        return f"memory is {memory:.4g} GiB, which is too small for the weights of {wish.model}; take a smaller model"
    stored = "" if least.quantize == "none" else f" in {least.quantize}"
    how = "" if least.checkpointing == "none" else " with checkpointing"
    return (
        f"memory is {memory:.4g} GiB; {wish.model}{stored}, {planner.workload.example(least)} at a time{how}, "
        f"needs {figure:g} GiB: give {way}--memory {figure:g}, or take a smaller model"
    )


def _adapter(settings: PlanSettings) -> dict[str, Chosen]:
    averages = "the paper's averages: 77.5 at rank 16, 78.4 at 32, LoRA 74.7 at 32 (LLaMA-7B)"
    small = "" if settings.rank == PlanSettings.rank else "the smallest side of the layers; "
    return {
        "method": Chosen(settings.method, "magnitude and direction apart; a step takes 0.97 to 1.07 of LoRA's"),
        "rank": Chosen(settings.rank, small + averages),
        "alpha": Chosen(2 * settings.rank, "2 * rank, as in the paper"),
        "targets": Chosen(settings.targets, "every linear layer but the head, as in the paper's instruction tuning (Table 11)"),
    }


def _rates(numbers: int, facts: DataFacts, epochs: Chosen, together: Chosen) -> dict[str, Chosen]:
    rate, why = next((rate, why) for limit, rate, why in RATES if numbers < limit)
    steps = max(1, math.ceil(facts.examples * epochs.value / together.value))
    return {
        "lr": Chosen(rate, f"{numbers / 1e9:.2g} billion numbers; {why}"),
        "schedule": Chosen("linear", "the paper's"),
        "warmup_steps": Chosen(min(100, steps // 10), f"a tenth of about {steps} steps, at most the paper's 100"),
        "epochs": epochs,
    }


def _sizes(plan: MemoryPlan, wish: RunWish, memory: float, together: Chosen, length: Chosen, dense: int) -> dict[str, Chosen]:
    """What depends on the memory."""
    s = plan.settings
    packed = f"the base is {dense / 2**30:.1f} GiB in {s.dtype}, so it is packed: QDoRA (pip install 'doratune[quantized]')"
    stored = "the base fits as it is" if s.quantize == "none" else packed
    split = "" if s.gradient_accumulation == 1 else f", {s.batch_size} at a time for the memory"
    known = f"{plan.total / 2**30:.2f} GiB planned of {memory:.4g}"
    known = "this model's step cannot be planned, so one example at a time" if plan.uncounted else known
    more = "" if s.checkpointing == "none" else "; a third more time for less memory"
    all_in_all = f"{s.batch_size * s.gradient_accumulation} examples a step in all"
    choices = {
        "batch_size": Chosen(s.batch_size, together.reason + split),
        "gradient_accumulation": Chosen(s.gradient_accumulation, all_in_all),
        "max_length": length,
        "dtype": Chosen(s.dtype, "of the frozen base; A, B and m stay float32"),
        "quantize": Chosen(s.quantize, stored if wish.quantize == "auto" else "as asked for"),
        "checkpointing": Chosen(s.checkpointing, known + more),
    }
    if s.processes > 1:
        choices["processes"] = Chosen(s.processes, "one for each device; memory is of each")
        choices["fsdp"] = Chosen(s.fsdp, "each device holds a part of the base")
    return choices
