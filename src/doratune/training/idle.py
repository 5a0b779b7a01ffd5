"""Adapted layers that do not train: named in the first steps of a run, which stops there unless it is told to go on.

    first step        a weight is read past its layer's forward (`adapter/running.py`): nothing will change that
    step `PATIENCE`   a layer had no gradient in any step so far: it does not run, or its output is not in the loss

A layer that does not run, nor the module around it, while its like in the same list had gradients (an expert that no token has
reached yet, a layer that was dropped) is only named. Steps without any gradient at all count for nothing: a loss whose items are
all masked says nothing. What one process sees counts for all. Cost: in those steps one look at the gradients of layers that had
none yet.
"""

from __future__ import annotations

import contextlib
import logging
import re

import torch
from torch import nn
from transformers import TrainerCallback

from ..adapter.attach import adapters, record_of
from ..adapter.fresh import unsaved
from ..adapter.layer import never_trained
from ..adapter.running import Running, watchable
from ..errors import UserError, listed
from ..layers.adapted import own_parameters

logger = logging.getLogger(__name__)

PATIENCE = 10
"""Optimizer steps until a layer without a gradient is called idle."""


class IdleLayers:
    """The look-out of one run."""

    def __init__(self, model: nn.Module, policy: str = "stop", say=logger.warning, gradients: bool = True):
        """gradients: does this engine leave them on the parameters? Else having run is enough."""
        self.model, self.policy, self.say, self.gradients = model, policy, say, gradients
        self.layers = dict(adapters(model))
        trained = {name: _trained(layer) for name, layer in self.layers.items()}
        self.pending = {name: parameters for name, parameters in trained.items() if parameters}  # without a gradient so far
        self.calls = {name: layer.adapted.calls for name, layer in self.layers.items()}
        self.steps, self.any_gradient, self.watches = 0, False, watchable(model)
        self.seen: list[Running] = []
        self.passed_by: set[str] = set()

    def forward(self):
        """A context for a forward of the model: calls are watched until the first optimizer step."""
        if self.steps or not self.watches:
            return contextlib.nullcontext()
        self.seen.append(Running(self.model))
        return self.seen[-1]

    def after_backward(self) -> None:
        """Look at the gradients, before the optimizer takes them."""
        if self.steps >= PATIENCE:
            return
        if not self.any_gradient:
            self.any_gradient = not self.gradients or _has_gradient(self.model.parameters())
        done = [n for n, own in self.pending.items() if (_has_gradient(own) if self.gradients else self._ran(n))]
        for name in done:
            del self.pending[name]

    def after_step(self) -> None:
        """An optimizer step is done."""
        if self.steps >= PATIENCE or not self.any_gradient:
            return
        self.steps += 1
        if self.steps == 1:
            self.passed_by = {name for seen in self.seen for name in seen.passed_by}
            reads = {name: f"its weight is read by {function}" for seen in self.seen for name, function in seen.reads.items()}
            self.seen.clear()
            self._report(self._agreed(reads))
        if self.steps == PATIENCE:
            self.finish(self.policy)

    def finish(self, policy: str = "warn") -> None:
        """Training has come to `PATIENCE` or to its end: what had no gradient until now."""
        if not self.steps:
            return
        alike = {_pattern(name) for name in self.layers if name not in self.pending}
        reached = {name for name in self.pending if self._ran(name) or name in self.passed_by}
        waiting = [name for name in self.pending if name not in reached and _pattern(name) in alike]
        if waiting:
            self.say(f"not reached in {self.steps} steps, while others of their list had gradients: {listed(waiting)}")
        self._report(self._agreed({name: self._why(name) for name in self.pending if name not in waiting}), policy)

    def _why(self, name: str) -> str:
        if self._ran(name):
            return "no gradient reaches it"
        return "it does not run, the module around it does" if name in self.passed_by else "it does not run"

    def _ran(self, name: str) -> bool:
        return self.layers[name].adapted.calls != self.calls[name]

    def _agreed(self, reasons: dict[str, str]) -> dict[str, str]:
        """What any process has seen; each of them asks at the same steps."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return reasons
        device = next(self.model.parameters()).device
        flags = torch.tensor([name in reasons for name in self.layers], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        seen = [name for name, flag in zip(self.layers, flags.tolist(), strict=True) if flag]
        return {name: reasons.get(name, "as another process saw") for name in seen}

    def _report(self, reasons: dict[str, str], policy: str | None = None) -> None:
        lines = []
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, why in reasons.items() if why == reason]
            lines.append(f"{listed(names)} ({reason})")
        for name in reasons:
            self.pending.pop(name, None)
        if not lines:
            return
        text = f"adapted layers that do not train, after step {self.steps}: {'; '.join(lines)}"
        if (policy or self.policy) == "stop":
            raise UserError(f"{text}; leave them out (exclude), or set idle_layers: warn")
        self.say(text)


def _trained(layer) -> list[nn.Parameter]:
    frozen = never_trained(layer.adapted)
    return [p for name, p in own_parameters(layer).items() if name not in frozen and p.requires_grad]


def _has_gradient(parameters) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in parameters)


def _pattern(name: str) -> str:
    """`experts.*.up` of `experts.3.up`: the same for all in a list."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


class IdleWatch(TrainerCallback):
    """The look-out in a Trainer's loop."""

    def __init__(self, trainer):
        self.trainer, self.idle = trainer, None

    def on_train_begin(self, args, state, control, **kwargs):
        t = self.trainer
        model = t.accelerator.unwrap_model(t.model, keep_torch_compile=False)
        if lost := unsaved(model, record_of(model).also_train):
            logger.warning("in no file, and not trained: %s; name their modules in also_train", listed(lost))
        sharded = t.is_deepspeed_enabled or t.is_fsdp_enabled
        self.idle = IdleLayers(model, t.idle_layers, gradients=not sharded)

    def on_step_end(self, args, state, control, **kwargs):
        if self.idle is not None:
            self.idle.after_step()

    def on_train_end(self, args, state, control, **kwargs):
        if self.idle is not None and self.idle.steps < PATIENCE:
            self.idle.finish()

    def forward(self):
        return contextlib.nullcontext() if self.idle is None else self.idle.forward()

    def after_backward(self) -> None:
        if self.idle is not None:
            self.idle.after_backward()
