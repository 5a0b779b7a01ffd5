"""What every layer kind offers: how its weight is the matrix W (O, I) of the maths, and one forward.

A new kind is one new file with a subclass, and its name in `layers/__init__.py`. Kinds have no state: one instance each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..bases import Base, base_of
from ..errors import with_article

RESERVED = ("adapted", "magnitude", "scaling")
"""Names that an adapted layer gives to a module, besides its direction's."""


class LayerKind:
    name: str
    weight_name = "weight"
    bias_name = "bias"
    may_be_quantized = False
    """Do quantizers make layers of this kind?"""
    linear = True
    """Is it selected by `all-linear`?"""
    peft_axis = "output"
    """The axis of its magnitude in PEFT's files."""
    by_name_only = False
    """Is it left out of `all-layers`?"""
    stacked = False
    """Is its weight a batch of matrices (E, O, I)?"""
    transposed = False
    """Is its weight stored (I, O)?"""
    splits = False
    """Can a process compute some of its output rows, or a part of the sum over its input columns?"""
    linear_in_x = True
    """Is its output linear in its input, but for a bias? Not where that holds ids."""
    batch_first = True
    """Is the first dimension of its input, where it has more than the last, the batch?"""

    def matches(self, module: nn.Module) -> bool:
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> Tensor:
        """W (O, I), a view wherever the memory allows."""
        return weight

    def rows(self, weight: Tensor, which, flatten: bool = True) -> Tensor:
        """Rows `which` of W (K, I); not flattened: as they lie in the weight, to be written to."""
        return weight[which]

    def forward(self, layer, *args, **kwargs):
        """The adapted layer's output; `layer.base_forward` is the plain layer's own forward."""
        raise NotImplementedError

    def finishes(self, weight) -> bool:
        """Can `finish` make the adapted layer's output?"""
        return False

    def finish(self, layer, x: Tensor, out: Tensor) -> Tensor:
        """The adapted layer's output from the plain layer's, without gradients."""
        raise NotImplementedError

    def base(self, module: nn.Module) -> Base | None:
        """The storage of its weight."""
        return base_of(self, module)

    def refusal(self, module: nn.Module) -> str | None:
        """Why this module cannot be adapted at all, or None."""
        if taken := [name for name in RESERVED if hasattr(module, name)]:
            return f"its class {type(module).__name__} has an attribute {taken[0]!r} of its own"
        if "forward" in vars(module) and not calls_its_class(module):
            return "its forward was replaced on the instance, so an adapter there would do nothing"
        if self.base(module) is None:
            return self._unknown_storage(module)
        return self.probe(module)

    def prepares(self, weight) -> bool:
        """Do calls need prepared factors?"""
        return True

    def own_product(self, weight, cls: type) -> bool:
        """May the op compute the product of layers of this plain class?"""
        return False

    def output_columns(self, weight, x: Tensor, rows: Tensor) -> Tensor:
        """What the backward takes again from W where a bias drowns the output: the product without bias, columns `rows`, in the
        wide dtype; of a kind that rescales its output, with the low-rank part."""
        raise NotImplementedError

    def weight(self, **choices):
        """What a layer of this kind is adapted with."""
        from .weight import AdaptedWeight

        return AdaptedWeight(**choices)

    def file_tensors(self, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors in the shapes and under the names that PEFT's files have for this kind."""
        return tensors

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo `file_tensors`, of tensors that are matrices and vectors already."""
        return tensors

    def file_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Names and shapes, as matrices and vectors, that a file has for these."""
        return shapes

    def key(self, name: str) -> str:
        """The weight's name in `named_parameters`, for a layer of this name."""
        return f"{name}.{self.weight_name}"

    def home(self, module: nn.Module) -> nn.Module:
        """The module that owns the weight."""
        return module

    def leaf(self, module: nn.Module) -> str:
        """The weight's name among that module's parameters."""
        return self.weight_name

    def joined(self, module: nn.Module) -> None:
        """Called once the module is adapted."""

    def left(self, module: nn.Module) -> None:
        """Called once it is a plain module again."""

    def axis(self, config) -> str:
        """Along which axis of W the magnitude lies."""
        return config.magnitude_axis

    def axis_refusal(self, module: nn.Module) -> str | None:
        """Why one magnitude per input column is not defined for this module, or None."""
        return None

    def probe(self, module: nn.Module) -> str | None:
        """Why its forward is not this kind's, tried on an input; None: it is."""
        return None

    def _unknown_storage(self, module: nn.Module) -> str:
        weight = getattr(module, self.weight_name, None)
        kind = type(weight.data if isinstance(weight, nn.Parameter) else weight).__name__
        dtype = f" of {weight.dtype}" if isinstance(weight, Tensor) else ""
        return f"its weight is {with_article(kind)}{dtype}, a storage that is not known; see doratune.bases.register"

    def __reduce__(self):
        from . import kind_named

        return kind_named, (self.name,)


def outside_compile(function):
    """`function`, run as it is where torch.compile traces its caller: a break in the graph."""
    disabled = torch._disable_dynamo(function)  # torch.compiler.disable would import the compiler right here

    @functools.wraps(function)
    def run(*args, **kwargs):
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return run


def calls_its_class(module: nn.Module) -> bool:
    """Does a forward that was put on the instance end in the class's own?"""
    return any(True for _ in class_forwards(module))


def class_forwards(module: nn.Module) -> Iterator[Callable]:
    """Of each place on the instance that holds the class's own forward, what puts another there.

    accelerate's hooks keep it as an attribute; the function of transformers' tensor-parallel plans has it in its closure."""
    for name in ("forward", "_old_forward"):
        held = vars(module).get(name)
        if _is_class_forward(held, module):
            yield functools.partial(setattr, module, name)
        for cell in getattr(held, "__closure__", None) or ():
            if _is_class_forward(_content(cell), module) and cell.cell_contents.__self__ is module:
                yield functools.partial(setattr, cell, "cell_contents")


def _is_class_forward(held, module: nn.Module) -> bool:
    return getattr(held, "__func__", None) is type(module).forward


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


@torch.no_grad()
def differs(module: nn.Module, inputs: tuple, expected: Tensor, meaning: str) -> str | None:
    """A sentence if the module's forward does not give `expected`."""
    try:
        got = module(*inputs)
        same = torch.is_tensor(got) and got.shape == expected.shape and (got - expected).norm() <= 1e-2 * expected.norm()
    except Exception as error:  # any forward of any class
        return f"its forward fails on a plain tensor ({type(error).__name__})"
    return None if same else f"the forward of {type(module).__name__} is not {meaning}"
