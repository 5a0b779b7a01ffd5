"""Parameters that DeepSpeed's ZeRO-3 keeps in parts: empty tensors in their modules, whole ones while their module runs.

The parameter is one object all the time; its data come and go, and `ds_tensor` is this process's part of them. What is derived from
a weight is kept under that part (`shares.py`). Wherever else one looks at a layer, its parameters are gathered as DeepSpeed does it
itself; every process comes there. Cost: that of a forward of the layer.
"""

from __future__ import annotations

import contextlib
import sys

from torch import Tensor, nn

MARK = "_original_parameters"
"""Attribute that ZeRO-3 leaves on a module."""


class Partition:
    """One tensor that ZeRO-3 keeps in parts."""

    __slots__ = ("param",)
    cast = False

    def __init__(self, param):
        self.param = param

    @property
    def local(self) -> Tensor:
        """This process's own numbers, in one row."""
        return self.param.ds_tensor


def partition(t) -> Partition | None:
    """Of a parameter under ZeRO-3, also of one that it leaves whole because it is small."""
    return Partition(t) if hasattr(t, "ds_tensor") else None


def in_parts(t) -> bool:
    """Is it empty just now?"""
    status = getattr(t, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def numbers(p: Tensor) -> int:
    """How many a parameter has, whole."""
    return getattr(p, "ds_numel", p.numel())


@contextlib.contextmanager
def gathered(module: nn.Module, write: bool):
    """The module's own parameters whole; write: what the first process wrote into them goes back into the parts."""
    params = [p for p in module._parameters.values() if in_parts(p) or (write and partition(p) is not None)]
    if not params:
        yield
        return
    with sys.modules["deepspeed"].zero.GatheredParameters(params, modifier_rank=0 if write else None):
        yield
