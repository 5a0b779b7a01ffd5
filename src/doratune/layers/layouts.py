"""Which modules hold batched expert weights in a layout that is known, and the names of those weights as layers.

    <module>.gate_up_proj (or up_proj), <module>.down_proj        of modules made with transformers' `use_experts_implementation`

Known means: the decorator's facts are there and the shapes fit each other. (`experts.py` tries the forward besides.) Cost: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .experts import CHILD, AdaptedExperts, ExpertWeight
from .kind import calls_its_class
from .wrappers import module_at, named_modules

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_FACTS = ("has_gate", "has_bias", "is_transposed", "num_experts")


def is_experts(module: nn.Module) -> bool:
    """Does it look like a batch of experts, whatever its layout?"""
    if isinstance(module, ExpertWeight) or not ("expert" in type(module).__name__.lower() or hasattr(module, "num_experts")):
        return False
    held = (*module._parameters.values(), *module._buffers.values())
    return any(t is not None and not nn.parameter.is_lazy(t) and t.dim() >= 3 for t in held)


def expert_weights(owner: nn.Module) -> Iterator[ExpertWeight]:
    """The batched weights of an experts module of known layout, adapted or not."""
    for part in WEIGHTS:
        if owner._parameters.get(part) is not None:
            yield owner._modules.get(CHILD + part) or ExpertWeight(owner, part)


def layout_problem(owner: nn.Module) -> str | None:
    """Why the weights of an experts module cannot be adapted, or None."""
    if isinstance(owner, AdaptedExperts):
        return None
    unknown = f"{type(owner).__name__} is an expert layout that is not known"
    if missing := [name for name in _FACTS if not hasattr(owner, name)]:
        return f"{unknown} (no {missing[0]}, which transformers' use_experts_implementation sets)"
    up, down = (owner._parameters.get(name) for name in ("gate_up_proj" if owner.has_gate else "up_proj", "down_proj"))
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return f"{unknown}: it lacks three-dimensional up and down projections"
    rows, inner = (up.mT if owner.is_transposed else up).shape[1], (down.mT if owner.is_transposed else down).shape[2]
    if rows != inner * (2 if owner.has_gate else 1) or len(up) != len(down):
        return f"the shapes of its projections do not fit each other: {tuple(up.shape)} and {tuple(down.shape)}"
    if "forward" in vars(owner) and not calls_its_class(owner):
        return "its forward was replaced on the instance, so an adapter there would do nothing"
    return None


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the plain model, with the batched weights of experts as layers `<module>.<weight>`, adapted or not."""
    for name, module in named_modules(model):
        if isinstance(module, ExpertWeight):
            continue
        yield name, module
        if is_experts(module) and layout_problem(module) is None:
            yield from ((f"{name}.{layer.part}" if name else layer.part, layer) for layer in expert_weights(module))


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of this name in the plain model: a module, or a batched weight of experts."""
    owner, _, part = name.rpartition(".")
    if part in WEIGHTS:
        module = module_at(model, owner)
        if is_experts(module):
            return next(layer for layer in expert_weights(module) if layer.part == part)
    return module_at(model, name)
