"""`verify`: is every target really DoRA? What is checked is what silently went wrong elsewhere.

Every target wrapped, A, B and m trainable and in fp32, finite, the step-0 identity while B = 0, rows without direction, rows whose
norm had to be clamped, parameters that no file holds, weights that are read past their layer's forward (`running.py`), and, with an
example, modules that never ran and the model's output bit for bit. Without one the model runs on an input made from its config, if
it has one, which need not reach all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import listed
from ..layers import stored_in
from ..layers.adapted import become, own_parameters
from ..layers.fsdp import reshard
from ..layers.shares import at_hand, gathered, tree_at_hand
from ..layers.wrappers import module_at, named_parameters, unwrapped
from ..layers.zero3 import numbers
from ..support.examples import candidates, flat_tensors
from .attach import adapters, record_of
from .foreign import foreign
from .fresh import unsaved
from .layer import altered, never_trained, untouched
from .running import Running, watchable
from .states import refuse_merged
from .statistics import moving_statistics


@dataclass
class Report:
    """What `verify` found; `problems` is empty when all is well.

    `never_ran`: layers that the example did not reach; `bypassed`: layer → why its adapter does nothing, or not all; `ran`: was the
    model run?"""

    adapted: int = 0
    trainable: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    zero_rows: dict[str, int] = field(default_factory=dict)
    clamped_rows: dict[str, int] = field(default_factory=dict)
    never_ran: list[str] = field(default_factory=list)
    bypassed: dict[str, str] = field(default_factory=dict)
    ran: bool = False
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{self.adapted} layers adapted, {self.trainable:,} trainable parameters"]
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        lines += self.notes + [f"problem: {problem}" for problem in self.problems]
        passed = "all checks passed" if self.ran else "all checks passed that need no example; running was not checked"
        return "\n".join(lines + ([] if self.problems else [passed]))


@torch.no_grad()
def verify(model: nn.Module, example: Sequence[Any] | Mapping[str, Any] | Tensor | None = None) -> Report:
    """Check an attached model.

    Args:
        example: input of the model (a tensor, positional arguments, or keyword arguments): also run it, once with the
            adapters and once without. None: it runs once, on an input made from its config, if it can be made.

    Raises:
        UserError: nothing is attached, or the adapter is merged.
    """
    record, model = record_of(model), unwrapped(model)
    refuse_merged(record, "doratune.verify")
    record.registry.find_shares(model)
    layers = dict(adapters(model))
    report = Report(len(layers), left_out=dict(record.left_out))
    report.trainable = sum(numbers(p) for p in model.parameters() if p.requires_grad)
    if lost := [name for name in record.names if name not in layers]:
        report.problems.append(f"{listed(lost)}: attached, but no longer adapted (was the module replaced?)")
    frozen_adapter = not report.trainable
    if others := foreign(model):
        report.problems.append(f"another package's adapter is in the model: {listed(others, 3)}")
    report.problems += [f"{name}: {problem}" for name, layer in layers.items() if (problem := altered(layer, layer.adapted))]
    for name, layer in layers.items():
        with at_hand(layer):
            _check_layer(name, layer, frozen_adapter, report)
    for name in record.also_train:
        with tree_at_hand(module_at(model, name)):
            for parameter, p in named_parameters(module_at(model, name)):
                _check_values(f"{name}.{parameter}", p, report)
    if frozen_adapter:
        report.notes.append("nothing is trainable: the adapter is attached for inference")
    if report.zero_rows:
        total = sum(report.zero_rows.values())
        report.notes.append(f"{total} rows without direction stay plain LoRA rows, in {listed(report.zero_rows)}")
    if report.clamped_rows:
        report.problems.append(f"norm close to 0 (|W + s·B·A| < 1e-6·|W|), clamped, in {listed(report.clamped_rows)}")
    if record.config.magnitude_from == "original":
        report.notes.append(_offset(layers.values()))
    report.notes += [f"{name}: {reason}, trained whole and saved" for name, reason in record.fresh.items()]
    if moving := moving_statistics(model):
        report.notes.append(
            f"running statistics are the base's and in no adapter's file ({listed(moving, 2)}): doratune's trainers hold them; in "
            "a loop of your own put these layers into eval() after model.train()"
        )
    if lost := unsaved(model, record.also_train):
        shown = [f"{name} ({reason})" for name, reason in lost.items()]
        report.problems.append(f"in no file, and not trained: {listed(shown, 4)}; name their modules in also_train")
    if example is not None:
        _run(model, layers, example, report)
    elif not watchable(model):
        report.notes.append("running was not checked: give verify an example of the model's input")
    else:
        _run_own(model, report)
    reshard(model)
    return report


def _offset(layers) -> str:
    """How far m, which started at the norm of another weight, is from n."""
    off = []
    for layer in layers:
        with at_hand(layer):
            n = layer.adapted.n()
            off.append(((gathered(layer.magnitude) - n).abs() / n)[~layer.adapted.facts.directionless])
    off = torch.cat([t.cpu() for t in off])
    sizes = f"{100 * off.mean():.2g} % on average, {100 * off.max():.2g} % at most"
    return f"m started at the unquantized weights' norm, so the start is not the base's: |m/n - 1| is {sizes}"


def _check_layer(name: str, layer, frozen_adapter: bool, report: Report) -> None:
    weight = layer.adapted
    frozen = never_trained(weight)
    for parameter, p in own_parameters(layer).items():
        if not p.requires_grad and not frozen_adapter and parameter not in frozen:
            report.problems.append(f"{name}.{parameter} is not trainable")
        _check_values(f"{name}.{parameter}", p, report)
    if weight.magnitude and layer.magnitude is None:
        report.problems.append(f"{name} has lost its magnitude")
    if not weight.magnitude or layer.magnitude is None:
        return
    directionless = weight.facts.directionless
    if zero := int(directionless.sum()):
        report.zero_rows[name] = zero
    if clamped := sum(_clamped(part) for part in weight.matrices()):
        report.clamped_rows[name] = clamped


def _check_values(name: str, p: nn.Parameter, report: Report) -> None:
    if p.is_floating_point() and p.dtype.itemsize < 4:
        report.problems.append(f"{name} is {p.dtype}, which AdamW cannot move; it must be fp32")
    if not torch.isfinite(p).all():
        report.problems.append(f"{name} holds NaN or infinite values")


def _clamped(weight) -> int:
    """Rows of one matrix whose norm is clamped."""
    A, B = weight.low_rank()
    if A is None or not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        return 0
    terms = weight.terms(A.to(weight.dtype), B.to(weight.dtype))
    return int((terms.clamped & ~weight.facts.directionless).sum())


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """In evaluation mode, and without a trace in the random numbers of training or in a quantized layer: bitsandbytes packs such a
    one anew where it is evaluated on a CPU, and then knows no gradient for it."""
    modes = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    for module in modes:
        if (base := stored_in(module)) is not None and not base.writable:
            module.training = True
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _run(model: nn.Module, layers: dict, example, report: Report) -> None:
    """Which layers run, and whether an untrained adapter leaves the output as it was."""
    with evaluating(model):
        _compare(model, layers, example, report)


def _run_own(model: nn.Module, report: Report) -> None:
    """Run on an input made from the config: what it does not reach is said, and is no problem."""
    with evaluating(model):
        for example in candidates(model):
            seen = Running(model)
            try:
                with seen:
                    model(**example)
            except Exception:  # of any model: no config says all that a forward asks for
                continue
            _take(seen, report, own=True)
            idle = [name for name in report.never_ran if name not in report.bypassed]
            if idle:
                report.notes.append(f"not reached by an input made from the config, so not checked: {listed(idle)}")
            return
    report.notes.append("running was not checked: no input could be made from the config; give verify an example")


def _take(seen: Running, report: Report, own: bool = False) -> None:
    """own: of an input that nobody gave, which may just not be one that a layer is for."""
    report.ran, report.never_ran = True, seen.never_ran
    report.bypassed = {name: why for name, why in seen.problems().items() if name in seen.reads or not own}
    for reason in dict.fromkeys(report.bypassed.values()):
        names = [name for name, why in report.bypassed.items() if why == reason]
        report.problems.append(f"{listed(names)}: {reason}; an adapter there does nothing: exclude it")


def _compare(model: nn.Module, layers: dict, example, report: Report) -> None:
    seen = Running(model)
    with seen if watchable(model) else contextlib.nullcontext():
        _call(model, example)
    _take(seen, report)
    with_adapter = _call(model, example)  # unwatched: PyTorch's fast paths are others while it is watched
    if report.never_ran:
        report.problems.append(f"never ran on the example: {listed(report.never_ran)}")
    at_start = all([untouched(layer) for layer in layers.values()])  # of shards each process asks for all
    if at_start and record_of(model).config.magnitude_from == "base":
        classes = {name: type(layer) for name, layer in layers.items()}
        try:
            for layer in layers.values():
                become(layer, type(layer).plain_class)
            without = _call(model, example)
        finally:
            for name, layer in layers.items():
                become(layer, classes[name])
        if not all(torch.equal(a, b) for a, b in zip(flat_tensors(with_adapter), flat_tensors(without), strict=True)):
            report.problems.append("the untrained adapter changes the output; m was not taken from this model's weights")


def _call(model: nn.Module, example):
    if isinstance(example, Mapping):
        return model(**example)
    return model(*((example,) if torch.is_tensor(example) else example))
