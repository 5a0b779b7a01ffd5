"""The memory of a real training step, logged as plans log a traced one."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from doratune.planning.log import WEIGHTS, AllocationLog
from doratune.planning.step import autocast, optimizer_of, wrapped_forward
from doratune.support.models import contiguous_head


def peak_bytes(model: nn.Module, settings, loss: Callable, classes: int, before: Mapping[str, list[Tensor]] | None = None) -> int:
    """Most bytes alive in the second step of a model that is ready to train.

    settings: the recipe. loss: takes the forward. classes: as `AllocationLog`. before: {term: tensors that are there already}."""
    model.train()
    if settings.checkpointing != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": settings.checkpointing == "reentrant"})
    optimizer, trained = optimizer_of(settings, model, False), [p for p in model.parameters() if p.requires_grad]

    def step():
        with autocast(settings):
            value = loss(wrapped_forward(model, settings))
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with contiguous_head(model):
        step()
        log = AllocationLog(classes)
        states = [t for state in optimizer.state.values() for t in state.values()]
        terms = {WEIGHTS: [*model.parameters(), *model.buffers(), *states]} | dict(before or {})
        for term, tensors in terms.items():
            for t in tensors:
                log.own(t, term)
        with log:
            step()
    return log.peak(0, log.operations)[0]
