"""One training step of a causal language model: forward, loss, backward, AdamW; every arm on the same tokens.

Two scenarios: `plain`, one batch a step; `accumulation + checkpointing`, several micro-batches a step with every layer's
forward run again in the backward pass (fewer rounds, our own two arms): there a norm per call would be paid many times over.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..support.progress import Progress, silent
from .arms import build, make_optimizer, trainable
from .clock import interleave, prepare, summary
from .settings import BenchSettings
from .shapes import random_ids

PLAIN, CHECKPOINTED = "plain", "accumulation + checkpointing"
RATIOS = {
    "dora/lora": ("dora", "lora"),
    "dora/lora_peft": ("dora", "lora_peft"),
    "frozen/lora_peft": ("frozen", "lora_peft"),
    "(dora-frozen)/(dora_peft-frozen)": ("dora", "dora_peft", "frozen"),
    "dora_dense/dora": ("dora_dense", "dora"),
    "dora_peft/dora": ("dora_peft", "dora"),
}
"""name: over, under, and what is taken off both."""


class TrainStep:
    """Callable: one step of `accumulation` micro-batches on ids (N, T)."""

    def __init__(self, model: nn.Module, ids: Tensor, accumulation: int = 1, checkpointing: bool = False):
        self.model, self.ids, self.accumulation = model.train(), ids, accumulation
        self.parameters = trainable(model)
        self.optimizer = make_optimizer(self.parameters)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()

    def __call__(self) -> None:
        for _ in range(self.accumulation):
            self.loss().backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        if self.parameters:
            return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        embedded = self.model.get_input_embeddings()(self.ids).detach().requires_grad_()
        return self.model(inputs_embeds=embedded, labels=self.ids, use_cache=False).loss


def measure(base: nn.Module, settings: BenchSettings, label: str, progress: Progress = silent) -> dict:
    """{rank: {scenario: {"arms": seconds, "ratios"}}} over the weights of `base`; with checkpointing at the first rank."""
    ids = random_ids(base, settings.batch_size, settings.length)
    return {
        str(rank): {
            scenario: _scenario(scenario, base, ids, rank, settings, f"train_step {label} rank {rank}, {scenario}", progress)
            for scenario in ((PLAIN, CHECKPOINTED) if rank == settings.ranks[0] else (PLAIN,))
        }
        for rank in settings.ranks
    }


def _scenario(scenario: str, base, ids: Tensor, rank: int, settings: BenchSettings, label: str, progress) -> dict:
    if scenario == PLAIN:
        arms, rounds, micro_batches, warm_up = settings.arms, settings.rounds, 1, settings.warm_up
    else:
        arms = [name for name in settings.arms if name in ("lora", "dora")]
        rounds, micro_batches, warm_up = settings.few_rounds, settings.accumulation, min(1, settings.warm_up)

    def make(name: str) -> TrainStep:
        model = build(name, base, settings.targets, rank)
        return TrainStep(model, ids, micro_batches, checkpointing=scenario == CHECKPOINTED)

    steps = prepare(arms, make, ids.device)
    with progress(label, (warm_up + rounds) * len(arms)) as advance:
        return summary(interleave(steps, rounds, warm_up, ids.device, advance), RATIOS)
