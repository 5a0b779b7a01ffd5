"""Fake tensors whose whole numbers are real: ids, masks and grids of a batch are small and decide shapes; what has a fraction has
none of its numbers.

    whole numbers of whole numbers    computed
    of fractions                      a comparison is false, anything else 1: a batch whose images hold no padding
    more than MOST numbers            fake, as fractions are

So the code of a model that counts its image tokens, or divides an image by its grid, is traced as it runs. Source: torch's
FakeTensorMode. Cost: the whole numbers, twice an operation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map

MOST = 2**24
AS_THEY_ARE = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.lift_fresh_copy.default,
)
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class WholeNumbers(FakeTensorMode):
    """A mode in which real tensors of whole numbers stay what they are."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.inside = False
        """Does the mode itself call an operation, while it makes a fake tensor?"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if self.inside or (tensors and func in AS_THEY_ARE and _holds_numbers(tensors[0])):
            return super().__torch_dispatch__(func, types, args, kwargs) if self.inside else func(*args)
        if func in INDEXED and args[0].is_floating_point():
            args = (args[0], [part for index in args[1] for part in _places(index)], *args[2:])
        real = all(_holds_numbers(t) for t in tensors)
        try:
            result = self._of_fakes(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not real:
                raise
            return func(*args, **kwargs)
        if not any(_is_small(t) for t in tree_leaves(result)):
            return result
        if real:
            return tree_map(self._without_fractions, func(*args, **kwargs))
        compared = any(t.is_floating_point() for t in tensors)
        return tree_map(lambda one: _standing_in(one, compared) if _is_small(one) else one, result)

    def _of_fakes(self, func, types, args, kwargs):
        """The operation's result without numbers."""
        self.inside = True
        try:
            args, kwargs = tree_map(lambda one: self.from_tensor(one) if _holds_numbers(one) else one, (args, kwargs))
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.inside = False

    def _without_fractions(self, one):
        if not isinstance(one, Tensor) or _holds_numbers(one):
            return one
        return self.from_tensor(one)


def _holds_numbers(one) -> bool:
    """Is it a real tensor of whole numbers?"""
    return isinstance(one, Tensor) and not isinstance(one, FakeTensor) and not one.is_floating_point() and not one.is_complex()


def _is_small(one) -> bool:
    """A fake result whose numbers are wanted."""
    whole = isinstance(one, FakeTensor) and not one.is_floating_point() and not one.is_complex()
    return whole and one.device.type != "meta" and isinstance(one.numel(), int) and one.numel() <= MOST


def _places(index) -> tuple:
    """A mask as the whole numbers that it stands for, one tensor a dimension."""
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) and _holds_numbers(index):
        return torch.nonzero(index, as_tuple=True)
    return (index,)


def _standing_in(one: FakeTensor, compared: bool) -> Tensor:
    value = torch.zeros if compared and one.dtype == torch.bool else torch.ones
    return value(one.shape, dtype=one.dtype)
