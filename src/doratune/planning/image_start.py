"""doratune init for image models: what the data are classes of, by what they hold and which heads the model can have, and settings
that fit.

Masks are looked for first: a folder of images and masks would also pass for one of two classes. Settings are those of each kind's
guide (`workloads/`); what fits is asked of the plan. Cost: listing the data, and a trace for each change that is tried.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass, field

from ..errors import UserError
from ..support.image_heads import head_for
from ..training.objectives import objective_of
from ..training.recipe import TrainRecipe
from .architecture import architecture_of
from .configs import config_of
from .plan import MemoryPlan, Planner, capacity_of
from .settings import PlanSettings
from .start import Chosen, RunWish, Start, fitting
from .workloads import workloads
from .workloads.image_text import ImageTextWorkload
from .workloads.images import ImageWorkload

FEWEST_STEPS = 50
FREE = 0.25
"""Share of the memory that a plan leaves free here: what it missed at most against measured runs of a ResNet (docs/planning.md)."""


@dataclass(frozen=True)
class ImageFacts:
    """What a start needs to know of images.

    Attributes:
        classes: of images or pixels. held_out: has the data a part for evaluation? unusable: a line for each item left out.
    """

    workload: type[ImageWorkload]
    examples: int
    classes: int
    held_out: bool
    unusable: list[str] = field(default_factory=list)


def image_workloads(config) -> list[type[ImageWorkload]]:
    """Those that a model of this config can have a head for, what asks more of the data first; none for what writes text."""
    if ImageTextWorkload.takes(config) or head_for(next(iter(config.architectures or ()), None), config.model_type) is None:
        return []
    those = [one for one in workloads() if issubclass(one, ImageWorkload) and one.head.fits(config.model_type)]
    return sorted(those, key=lambda one: -one.asks)


def image_facts(model: str, sources: list[str], config, columns: dict[str, str], say) -> ImageFacts | None:
    """What the data are, for a model of images; None for a language model.

    Raises:
        UserError: the data are nothing that a head of this model learns from, with the reason of the last kind that was tried.
    """
    reason = None
    for one in image_workloads(config):
        recipe = TrainRecipe(model=model, data=sources, objective=one.objective, columns=columns, bad_items="skip")
        objective, unusable, notes = objective_of(recipe), [], []
        try:
            items = objective.read(sources, unusable, notes.append)
        except UserError as error:
            reason = error
            continue
        for note in notes:
            say(note)
        return ImageFacts(one, len(items), len(objective.labels), _held_out(objective, sources), unusable)
    if reason is not None:
        raise reason
    return None


def _held_out(objective, sources: list[str]) -> bool:
    try:
        return bool(len(sources) == 1 and objective.held_out(sources[0], []))
    except UserError:
        return False


def image_start_of(wish: RunWish, facts: ImageFacts, config=None) -> Start:
    """Settings that fit.

    Raises:
        UserError: no such model, or the memory is too small for it.
    """
    config = config or config_of(wish.model, wish.trust_remote_code)
    memory = capacity_of(PlanSettings(model=wish.model, memory=wish.memory, device=wish.device)) / 2**30
    guide = facts.workload.guide
    together = _images_a_step(facts, wish.processes)
    asked = PlanSettings(
        model=wish.model,
        objective=facts.workload.objective,
        device=wish.device,
        memory=memory * (1 - FREE),
        quantize="none" if wish.quantize == "auto" else wish.quantize,
        processes=wish.processes,
        batch_size=together.value,
        classes=facts.classes,
        targets="all-layers",
        rank=guide.rank,
        trust_remote_code=wish.trust_remote_code,
        largest="none",
    )
    asked = dataclasses.replace(asked, rank=min(guide.rank, _usual_side(asked, config)))
    plan = fitting(Planner(asked, config), dataclasses.replace(wish, quantize=asked.quantize), memory)
    return Start(_choices(plan, facts, together, memory), plan, memory)


def _usual_side(settings: PlanSettings, config) -> int:
    """The smaller side that at least half of the layers have: those that are smaller than the rank are left out (`all-layers`)."""
    built = architecture_of(dataclasses.replace(settings, rank=1), config)
    return statistics.median_low(min(spec["shape"]) for spec in built.adapters.values())


def _images_a_step(facts: ImageFacts, processes: int) -> Chosen:
    """Images that one optimizer step learns from."""
    guide = facts.workload.guide
    count = guide.together
    while count > 4 and facts.examples * guide.epochs / count < FEWEST_STEPS:
        count //= 2
    count = max(count, processes)
    count += -count % processes
    few = f"fewer than the guide's {guide.together}, so that there are {FEWEST_STEPS} steps"
    return Chosen(count, f"{count} images a step, as in the guide" if count == guide.together else few)


def _choices(plan: MemoryPlan, facts: ImageFacts, together: Chosen, memory: float) -> dict[str, Chosen]:
    s, guide = plan.settings, facts.workload.guide
    steps = max(1, math.ceil(facts.examples * guide.epochs / together.value))
    split = "" if s.gradient_accumulation == 1 else f", {s.batch_size} at a time for the memory"
    more = "" if s.checkpointing == "none" else "; a third more time for less memory"
    choices = {
        "method": Chosen(s.method, "magnitude and direction apart"),
        "rank": Chosen(s.rank, guide.source if s.rank == guide.rank else "the smaller side of half of the layers"),
        "alpha": Chosen(guide.alpha * s.rank / guide.rank, "the same guide's"),
        "dropout": Chosen(guide.dropout, "the same guide's"),
        "targets": Chosen(s.targets, "linear layers and convolutions; a new head is trained whole beside them"),
        "lr": Chosen(guide.lr, "the same guide's model; sweep it on another: doratune compare"),
        "schedule": Chosen("cosine", "the rate ends at 0"),
        "warmup_steps": Chosen(min(100, steps // 10), f"a tenth of about {steps} steps, at most 100"),
        "epochs": Chosen(guide.epochs, "passes over the images; the evaluation shows whether that is too often"),
        "batch_size": Chosen(s.batch_size, together.reason + split),
        "gradient_accumulation": Chosen(s.gradient_accumulation, f"{s.batch_size * s.gradient_accumulation} images a step in all"),
        "dtype": Chosen(s.dtype, "of the frozen base; what is trained stays float32"),
        "quantize": Chosen(s.quantize, "the base is small beside what its layers keep"),
        "checkpointing": Chosen(s.checkpointing, f"{plan.total / 2**30:.2f} GiB planned of {memory:.4g}{more}"),
    }
    if s.processes > 1:
        choices["processes"] = Chosen(s.processes, "one for each device; memory is of each")
    return choices
