"""Kernels of other packages that write over a layer's output, where the backward must not read it. Cost: one walk at attach."""

from __future__ import annotations

import sys

from torch import nn

WRITERS = ("liger_kernel", "unsloth")
"""Packages whose rotary embedding rotates q and k in the memory of the projection's output, unseen by version counters."""


def writing_kernels(model: nn.Module) -> str | None:
    """The package among `WRITERS` whose functions this model's modules call, or None. Being imported is not being used."""
    for cls in {type(module) for module in model.modules()}:
        functions = [vars(cls).get("forward"), *vars(sys.modules.get(cls.__module__, cls)).values()]
        for function in functions:
            package = (getattr(function, "__module__", None) or "").partition(".")[0]
            if package in WRITERS and callable(function):
                return package
    return None
