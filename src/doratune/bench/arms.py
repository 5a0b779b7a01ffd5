"""The arms that every measurement compares, all over the same frozen weights.

    frozen            the base model alone; in training, forward and the whole chain of input gradients: nothing can cost less
    lora              LoRA by this package
    dora              DoRA by this package
    lora_peft         LoRA by PEFT, unmodified, default settings
    dora_peft         DoRA by PEFT, unmodified, default settings
    dora_dense        DoRA as plain dense W + s·B·A in eager mode: what one writes down first
    accelerated_peft  dora_peft after `doratune.peft.accelerate`; measured where it is asked for

A copy of the model shares its parameters' and buffers' memory with the others, so these arms cost one model. The allocator is held
still (`allocator.py`) before any arm is built, whoever builds it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import doratune

from .allocator import hold_still

ALL_LINEAR = "all-linear"


def build(name: str, base: nn.Module, targets: list[str], rank: int, moved: bool = True) -> nn.Module:
    """A model of the arm `name` over the weights of `base`; alpha = 2·rank.

    moved: B and m away from their start (B ~ 1e-3, m · 1 ± 1e-2), since some implementations are quick where DoRA does nothing.
    """
    model = attach_arm(name, share(base), targets, rank)
    if moved:
        move(model)
    return model


def attach_arm(name: str, model: nn.Module, targets: list[str], rank: int, adapter: str = "default") -> nn.Module:
    """`model` with what the arm `name` adds to it, as it starts; it may be another module around it. adapter: its name there."""
    hold_still()
    targets = pattern(targets)
    if name in ("lora", "dora"):
        config = doratune.AdapterConfig(method=name, rank=rank, alpha=2.0 * rank, targets=targets)
        return doratune.attach(model, config, name=adapter)
    if name.endswith("_peft"):
        import peft

        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=name != "lora_peft")
        model = peft.get_peft_model(model, config)
        if name == "accelerated_peft":
            doratune.peft.accelerate(model)
        return model
    if name == "dora_dense":
        attach_dense(model, targets, rank)
    return model


def pattern(targets: list[str]) -> list[str] | str:
    """The names as they are; the one name "all-linear" as the word that this package and PEFT take for it."""
    return ALL_LINEAR if list(targets) == [ALL_LINEAR] else targets


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree over the same tensors, all frozen."""
    tensors = [*model.parameters(), *model.buffers()]
    for p in model.parameters():
        p.requires_grad_(False)
    return copy.deepcopy(model, {id(t): t for t in tensors})


@torch.no_grad()
def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_B" in name:
            p.add_(1e-3 * torch.randn(p.shape, generator=generator).to(p))
        elif "magnitude" in name:
            p.mul_(1 + 1e-2 * torch.randn(p.shape, generator=generator).to(p))


class DenseDoRALinear(nn.Module):
    """y = x·(m/|V| ⊙ V)ᵀ + bias with V = W + s·B·A formed in full, |V| detached (Eq. 5, §4.3)."""

    def __init__(self, linear: nn.Linear, rank: int, scaling: float):
        super().__init__()
        self.linear, self.scaling = linear, scaling
        weight = linear.weight
        bound = linear.in_features**-0.5
        A_RI = torch.empty(rank, linear.in_features, device=weight.device).uniform_(-bound, bound)
        self.lora_A = nn.Parameter(A_RI)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=weight.device))
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        W = self.linear.weight
        V = W + self.scaling * (self.lora_B.to(W.dtype) @ self.lora_A.to(W.dtype))
        gain = self.magnitude / torch.linalg.vector_norm(V, dim=1, dtype=torch.float32).detach()
        return F.linear(x, gain.to(W.dtype)[:, None] * V, self.linear.bias)


def attach_dense(model: nn.Module, targets: list[str] | str, rank: int) -> None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        wanted = module is not head if targets == ALL_LINEAR else own in targets
        if isinstance(module, nn.Linear) and wanted:
            setattr(model.get_submodule(parent), own, DenseDoRALinear(module, rank, 2.0))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer of every arm; its step is what makes a cached norm stale."""
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None
