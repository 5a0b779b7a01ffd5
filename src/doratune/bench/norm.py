"""The norm of one large layer, |W + s·B·A| row by row, uncached: seconds, extra memory, error.

    doratune   the factored norm of `math/norm.py`, from the fp32 parameters
    dense      W + s·B·A formed in W's dtype, normed in fp32
    peft       PEFT's: B·A as lora_B(lora_A(eye)) in fp32, then its own `get_weight_norm` on W as fp32

A and B are exact in W's dtype, so that all three are asked for the same numbers. Extra memory is the most bytes alive beyond
the inputs after any operation. The error is the largest relative one over the rows, against float64 in row tiles, with B
scaled so that |sBA| / |W| of the whole matrix is a given share.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import doratune

from ..support.progress import Progress, silent
from .allocator import hold_still
from .clock import FAILED, attempt, interleave, release, summary
from .memory import peak_bytes
from .settings import BenchSettings

SHARES = (0.01, 0.1)
DTYPE = torch.bfloat16
ROWS = 256
RATIOS = {"dense/doratune": ("dense", "doratune"), "peft/doratune": ("peft", "doratune")}


def measure(settings: BenchSettings, progress: Progress = silent) -> dict:
    """{dtype: {rank: {side: {"arms": seconds and peak_bytes, "ratios", "errors": by share of |sBA| / |W|}}}}."""
    hold_still()
    size, rank, device = settings.norm_size, settings.norm_rank, settings.torch_device()
    module = large_layer(size, rank, device)
    arms = ways(module, with_peft=any(name.endswith("_peft") for name in settings.arms))
    scale_share(module, SHARES[0])
    total = (settings.warm_up + settings.few_rounds) * len(arms)
    with progress(f"norm bfloat16 rank {rank}, {size} x {size}", total) as advance:
        result = summary(interleave(arms, settings.few_rounds, settings.warm_up, device, advance), RATIOS)
    for name, run in arms.items():
        peak = attempt(lambda run=run: _peak(run, device), device)
        if peak is not FAILED:
            result["arms"][name] |= peak
    result["errors"] = {str(share): errors(module, arms, share) for share in SHARES}
    return {"bfloat16": {str(rank): {str(size): result}}}


@torch.no_grad()
def large_layer(size: int, rank: int, device: torch.device) -> nn.Module:
    """An attached nn.Linear (size, size) in bf16 with W ~ 0.02 and random A and B."""
    generator = torch.Generator(device).manual_seed(0)
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(size, size, bias=False, device=device, dtype=DTYPE))
    model.layer.weight.normal_(0, 0.02, generator=generator)
    doratune.attach(model, doratune.AdapterConfig(rank=rank, targets=["layer"]))
    module = model.layer
    module.lora_A.copy_(module.lora_A.to(DTYPE))
    module.lora_B.normal_(generator=generator)
    return module


@torch.no_grad()
def scale_share(module: nn.Module, share: float) -> None:
    """B such that |s·B·A| / |W| = share over the whole matrix (up to B's rounding to W's dtype)."""
    A, B = module.lora_A.double(), module.lora_B.double()
    change = module.scaling * ((B.T @ B) * (A @ A.T)).sum().sqrt()
    whole = sum(tile.double().square().sum() for tile in module.weight.split(ROWS)).sqrt()
    module.lora_B.copy_((B * (share * whole / change)).to(DTYPE))


def ways(module: nn.Module, with_peft: bool) -> dict[str, Callable[[], Tensor]]:
    """Each way to the norm (O,), as a callable."""
    W, s = module.weight, module.scaling
    A, B = module.lora_A, module.lora_B

    @torch.no_grad()
    def dense() -> Tensor:
        V = W + s * (B.to(W.dtype) @ A.to(W.dtype))
        return torch.linalg.vector_norm(V, dim=1, dtype=torch.float32)

    @torch.no_grad()
    def peft() -> Tensor:
        from peft.tuners.lora.dora import DoraLinearLayer

        eye = torch.eye(A.shape[1], device=A.device, dtype=A.dtype)
        lora_weight = nn.functional.linear(nn.functional.linear(eye, A), B).T
        return DoraLinearLayer(fan_in_fan_out=False).get_weight_norm(W.to(A.dtype), lora_weight, s)

    arms = {"doratune": lambda: module.adapted.terms(A.detach().to(W.dtype), B.detach()).n, "dense": dense}
    return arms | {"peft": peft} if with_peft else arms


def _peak(run: Callable[[], Tensor], device: torch.device) -> dict[str, int]:
    peaks = {"peak_bytes": peak_bytes(run)}
    if device.type == "cuda":
        release(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        peaks["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return peaks


def errors(module: nn.Module, arms: dict[str, Callable[[], Tensor]], share: float) -> dict[str, float]:
    """Largest relative error of each way."""
    scale_share(module, share)
    exact = exact_norm(module)
    result = {}
    for name, run in arms.items():
        n = attempt(run, exact.device)
        if n is not FAILED:
            result[name] = ((n.double() - exact).abs() / exact).max().item()
    return result


@torch.no_grad()
def exact_norm(module: nn.Module) -> Tensor:
    """|W + s·B·A| (O,) in float64, row tile by row tile."""
    A, s = module.lora_A.double(), module.scaling
    tiles = zip(module.weight.split(ROWS), module.lora_B.split(ROWS), strict=True)
    return torch.cat([torch.linalg.vector_norm(W.double() + s * (B.double() @ A), dim=1) for W, B in tiles])
