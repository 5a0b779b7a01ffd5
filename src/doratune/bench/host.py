"""What a layer costs where the host is the limit: small dense layers in a row, few tokens, one thread.

A layer's products take next to no time at 64 × 64 and 4 tokens; what is left is Python, the dispatcher and the bookkeeping around
them, which is what a call of a large layer costs the host too. All arms run in one process, round by round, in an order that
turns; of every round these are timed, each by itself, in microseconds a layer:

    forward     with gradients; an optimizer step in front of it, not timed, has made stale whatever an arm prepares of its
                parameters, so it prepares anew within the forward, in every round
    backward    of that forward
    decode      one forward without gradients of the model in evaluation mode, the second after the step: nothing to prepare

Shown are the least of all rounds, which other work on the machine disturbs least, and the median. Beside them what an arm does is
counted (`operations.py`): operations a layer, also of a forward that has nothing to prepare; how many of them its call makes, the
rest being the model's look at its parameters, once a forward; and host reads of the whole model.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from torch import nn

from ..support.models import torch_dtype
from ..support.progress import Progress, silent
from .arms import build, make_optimizer, trainable
from .clock import quick_collection, synchronize, thread_count
from .operations import Count, count
from .settings import BenchSettings
from .startup import attach_seconds, import_seconds

TIMED = ("forward", "backward", "decode")
RATIOS = {
    "dora/lora": ("dora", "lora"),
    "dora/dora_peft": ("dora", "dora_peft"),
    "dora/lora_peft": ("dora", "lora_peft"),
    "lora/lora_peft": ("lora", "lora_peft"),
}
Rounds = dict[str, dict[str, list[float]]]
"""arm → what was timed → microseconds a layer, round by round."""


class HostArm:
    """One arm's model, and what is done to it in a round."""

    def __init__(self, model: nn.Module, width: int, tokens: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        x, self.dY = (torch.randn(tokens, width, generator=generator).to(device, dtype) for _ in range(2))
        self.model, self.x, self.y = model, x.requires_grad_(), None
        self.optimizer = make_optimizer(trainable(model))

    def renew(self) -> None:
        """An optimizer step on the gradients of the round before."""
        self.model.train()
        self.x.grad = self.y = None
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def forward(self) -> None:
        self.y = self.model(self.x)

    def backward(self) -> None:
        self.y.backward(self.dY)

    @torch.no_grad()
    def decode(self) -> None:
        self.model(self.x)

    def ready_to_decode(self) -> None:
        self.y = None
        self.model.eval()
        self.decode()


def small_layers(layers: int, width: int, dtype: torch.dtype, device: torch.device) -> nn.Sequential:
    """Linear layers (width, width) in a row without bias, named layer0, layer1, …; their outputs stay of the size of x."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential()
    for number in range(layers):
        layer = nn.Linear(width, width, bias=False)
        nn.init.normal_(layer.weight, std=width**-0.5, generator=generator)
        model.add_module(f"layer{number}", layer)
    return model.to(device, dtype)


def names(model: nn.Sequential) -> list[str]:
    return [name for name, _ in model.named_children()]


def measure(settings: BenchSettings, progress: Progress = silent) -> dict:
    """{dtype: {rank: {"arms": microseconds a layer, "ratios", "operations", "host_reads", "attach_s", "import_s"}}}."""
    dtype, device, layers = settings.dtypes[-1], settings.torch_device(), settings.host_layers
    arms = [name for name in settings.arms if name != "dora_dense"]
    with thread_count(1):
        base = small_layers(layers, settings.host_width, torch_dtype(dtype), device)
        models = {name: build(name, base, names(base), settings.host_rank) for name in arms}
        sizes = settings.host_width, settings.host_tokens, torch_dtype(dtype), device
        running = {name: HostArm(model, *sizes) for name, model in models.items()}
        total = (settings.warm_up + settings.host_rounds) * len(arms)
        with progress(f"host {dtype} rank {settings.host_rank}", total) as advance:
            taken = rounds(running, settings.host_rounds, settings.warm_up, layers, device, advance)
        fewer = small_layers(layers - 1, settings.host_width, torch_dtype(dtype), device)
        without_one = {name: HostArm(build(name, fewer, names(fewer), settings.host_rank), *sizes) for name in arms}
        counts = {name: operations(arm, without_one[name], layers) for name, arm in running.items()}
        many = small_layers(settings.attach_layers, settings.host_width, torch_dtype(dtype), device)
        result = {
            "arms": {name: {part: _least(times) for part, times in parts.items()} for name, parts in taken.items()},
            "ratios": {label: _ratio(taken[a], taken[b]) for label, (a, b) in RATIOS.items() if a in taken and b in taken},
            "operations": counts,
            "host_reads": {name: _reads(parts, layers) for name, parts in counts.items()},
            "attach_s": {name: attach_seconds(name, many, names(many), settings.host_rank) for name in arms if name != "frozen"},
            "import_s": import_seconds(),
        }
    return {dtype: {str(settings.host_rank): result}}


def rounds(arms: dict[str, HostArm], rounds: int, warm_up: int, layers: int, device: torch.device, advance) -> Rounds:
    """Each arm `warm_up` + `rounds` times in turn, no garbage collection within a round; the warm-up is not kept."""
    order = list(arms)
    taken: Rounds = {name: {part: [] for part in TIMED} for name in order}
    for arm in arms.values():  # gradients for the first optimizer step
        arm.forward()
        arm.backward()
    with quick_collection():
        for number in range(warm_up + rounds):
            turn = number % len(order)
            for name in order[turn:] + order[:turn]:
                times = _one_round(arms[name], device)
                if number >= warm_up:
                    for part, seconds in times.items():
                        taken[name][part].append(seconds * 1e6 / layers)
                advance(1)
    return taken


def _one_round(arm: HostArm, device: torch.device) -> dict[str, float]:
    """Seconds of each part."""
    arm.renew()
    gc.collect()
    gc.disable()
    try:
        times = {"forward": _seconds(arm.forward, device), "backward": _seconds(arm.backward, device)}
        arm.ready_to_decode()
        return times | {"decode": _seconds(arm.decode, device)}
    finally:
        gc.enable()


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def operations(arm: HostArm, without_one: HostArm, layers: int) -> dict[str, dict]:
    """What is counted of each part: operations a layer, those of them that one layer more adds (the rest is the model's, once a
    forward), host reads of the whole model, and the operations by name."""
    whole, fewer = _counts(arm), _counts(without_one)
    return {
        part: {
            "a_layer": one.operations / layers,
            "in_the_call": one.operations - fewer[part].operations,
            "host_reads": one.host_reads,
            "names": one.names,
        }
        for part, one in whole.items()
    }


def _counts(arm: HostArm) -> dict[str, Count]:
    """Part → what the model's forward or backward does."""
    arm.renew()
    counts = {"forward preparing": count(arm.forward), "forward": count(arm.forward), "backward": count(arm.backward)}
    arm.ready_to_decode()
    return counts | {"decode": count(arm.decode)}


def _reads(parts: dict[str, dict], layers: int) -> dict[str, int]:
    """Host reads of a model's forward with gradients, whichever has more; and how many of them every layer makes."""
    most = max(parts[part]["host_reads"] for part in ("forward preparing", "forward"))
    return {"a_model_forward": most, "a_layer": most // layers}


def _least(times: list[float]) -> dict[str, float]:
    return {"min": min(times), "p50": _median(times)}


def _ratio(over: dict[str, list[float]], under: dict[str, list[float]]) -> dict[str, float]:
    """Of the least times, and the median of those formed within the rounds."""
    result = {}
    for part in TIMED:
        result[f"{part}_min"] = min(over[part]) / min(under[part])
        result[f"{part}_p50"] = _median([a / b for a, b in zip(over[part], under[part], strict=True)])
    return result


def _median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()
