"""Weights that accelerate offloads (cpu_offload, disk_offload, a device map): fetched for a call, and on the meta device between.

Such a layer is fetched and put away by its own hook, as for a forward, wherever one looks at it. What is written goes to the memory
that it is fetched from, new tensors beside the files. Cost: that of a forward of the layer.
"""

from __future__ import annotations

import contextlib

from torch import Tensor, nn


class Offloaded:
    """One tensor that accelerate keeps elsewhere. It is not trained there, so nothing is compared."""

    local = None
    cast = False


def offloaded(module: nn.Module) -> bool:
    """Does accelerate keep this module's weights elsewhere between its calls?"""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None for one in hooks)


def on_disk(module: nn.Module) -> bool:
    """Does accelerate read this module's weights from files?"""
    place = _place(module) if offloaded(module) else None
    while hasattr(place, "prefix"):
        place = place.dataset
    return hasattr(place, "index")


def _place(module: nn.Module):
    """accelerate's mapping from this module's names to where their values are."""
    hook = module._hf_hook
    return next(one.weights_map for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False))


@contextlib.contextmanager
def loaded(module: nn.Module, write: tuple[str, ...]):
    """accelerate's own fetching before a forward and putting away after it."""
    if not offloaded(module) or not any(p is not None and p.is_meta for p in module._parameters.values()):
        yield
        return
    hook = module._hf_hook
    hook.pre_forward(module)
    try:
        yield
        for name in write:
            if (p := module._parameters.get(name)) is not None:
                _offload(_place(module), name, p.detach())
    finally:
        hook.post_forward(module, None)


def _offload(place, name: str, value: Tensor) -> None:
    """Put a value where accelerate fetches it from: into the memory that it lies in, or beside the files that have another."""
    while hasattr(place, "prefix"):
        place, name = place.dataset, place.prefix + name
    held = getattr(place, "state_dict", place)
    if name in held:
        held[name].copy_(value)  # the memory that others may know it by
        return
    held[name] = value.to("cpu", copy=True)
    if hasattr(place, "all_keys") and name not in place.all_keys:
        place.all_keys.append(name)


def take_along(module: nn.Module, names: list[str]) -> None:
    """Let accelerate put away the new parameters of a module that it offloads, and fetch them with the others."""
    for name in names:
        _offload(_place(module), name, module._parameters[name].detach())
