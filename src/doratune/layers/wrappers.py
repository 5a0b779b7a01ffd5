"""Modules that stand around one module and hand their forward to it, and the names that modules have without them.

    torch.compile(m)                       m is `_orig_mod`
    nn.DataParallel, DistributedDataParallel, AveragedModel        `module`
    checkpoint_wrapper, offload_wrapper    `_checkpoint_wrapped_module`
    FullyShardedDataParallel               `_fsdp_wrapped_module`
    doratune.as_peft(m)                    `base_model.model`

A model is the same model before and after one of its layers was compiled or wrapped: names here are those of the plain one. A
wrapper is known by its class, so that a user's own child called `module` keeps its name. Cost: one walk, as `named_modules`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("doratune.training.peft_view", "PeftView", "base_model"),
    ("doratune.training.peft_view", "Tuner", "model"),
)
"""(where its class lives, the class, the name of the child that it stands around). A class whose file was never imported has no
instances: nothing is imported to look."""

_SYNCHRONIZING = ("DistributedDataParallel", "FullyShardedDataParallel")
"""Those that look at the parameters once, when they are made."""

SEGMENTS = tuple(dict.fromkeys(child for _, _, child in _WRAPPERS))
"""What wrappers put into names."""


def unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper stands around, through any number of them; the module itself where it is none."""
    while (child := _child(module)) is not None:
        module = module._modules[child]
    return module


def _child(module: nn.Module) -> str | None:
    for home, name, child in _WRAPPERS:
        cls = getattr(sys.modules.get(home), name, None)
        if cls is not None and isinstance(module, cls) and module._modules.get(child) is not None:
            return child
    return None


def synchronizing(model: nn.Module) -> str | None:
    """Name of a wrapper in the model that averages the gradients of the parameters it was made with, and of no later ones."""
    classes = {name: getattr(sys.modules.get(home), name, None) for home, name, _ in _WRAPPERS if name in _SYNCHRONIZING}
    found = (name for module in model.modules() for name, cls in classes.items() if cls is not None and isinstance(module, cls))
    return next(found, None)


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`nn.Module.named_modules` of the plain model: no wrapper is among them, what it stands around has its name."""
    yield from _walk(model, "", set() if remove_duplicate else None)


def _walk(module: nn.Module, name: str, seen: set | None) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key, seen)


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """`nn.Module.named_parameters` of the plain model."""
    seen = set()
    for name, module in named_modules(model, remove_duplicate):
        for key, p in module._parameters.items():
            if p is not None and not (remove_duplicate and id(p) in seen):
                seen.add(id(p))
                yield f"{name}.{key}" if name else key, p


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`nn.Module.named_buffers` of the plain model."""
    for name, module in named_modules(model):
        yield from ((f"{name}.{key}" if name else key, b) for key, b in module._buffers.items() if b is not None)


def module_at(model: nn.Module, name: str) -> nn.Module:
    """`get_submodule` by a name of the plain model.

    Raises:
        AttributeError: there is no such module.
    """
    module = unwrapped(model)
    for key in name.split(".") if name else ():
        if (child := module._modules.get(key)) is None:
            raise AttributeError(f"{type(module).__name__} has no module {key!r}")
        module = unwrapped(child)
    return module


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Its `state_dict`, the very tensors, under the keys of the plain module."""
    module = unwrapped(module)
    names = dict(_paths(module, "", ""))
    state = {}
    for key, t in module.state_dict(keep_vars=True).items():
        owner, _, leaf = key.rpartition(".")
        plain = names.get(owner, owner)
        if torch.is_tensor(t):
            state[f"{plain}.{leaf}" if plain else leaf] = t
    return state


def _paths(module: nn.Module, path: str, name: str) -> Iterator[tuple[str, str]]:
    """(where a module is, its name in the plain model)."""
    yield path, name
    wrapped = _child(module)
    for key, child in module._modules.items():
        if child is not None:
            inner = name if key == wrapped else f"{name}.{key}" if name else key
            yield from _paths(child, f"{path}.{key}" if path else key, inner)
