"""Operations and host reads of a piece of code, counted as the dispatcher sees them. Deterministic: counted, not sampled.

    operation    every call that reaches the dispatcher, but views, which move no data, and allocations, which fill nothing
                 (`FREE`); an operation in place, a cast, a copy and a clone count, a `foreach` over many tensors counts once
    host read    a call that hands a value of a tensor to Python (`READS`), or copies one from a device to the CPU: on a GPU the
                 host waits there; it is counted among the operations too. What reads a CPU tensor's memory without a
                 call (`tolist`, `numpy`, `data_ptr`) is not seen

A dispatch mode sees what runs inside an autograd function, if it is active around the call, and that function's backward, if it
is active around `.backward()`. Composite operations (`linear`, `matmul`, `item`) are seen as what they are made of.

An adapted layer may notice that a mode is active and take other paths: it writes over no fresh output then, which a mode might
hold, so a count can be one operation higher than what runs without the mode. Such an operation is counted as it is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPES = {"view", "view_as", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_"}
ORDERS = {"t", "t_", "transpose", "transpose_", "permute", "movedim", "as_strided", "view_as_real", "view_as_complex"}
PARTS = {"expand", "expand_as", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "diagonal", "unfold"}
SAME = {"alias", "detach", "set_", "resize_", "lift", "lift_fresh", "lift_fresh_copy"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
FREE = frozenset(SHAPES | ORDERS | PARTS | SAME | ALLOCATIONS)
READS = frozenset({"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"})
COPIES = frozenset({"_to_copy", "copy_"})


@dataclass(frozen=True)
class Count:
    """What one run did."""

    operations: int
    host_reads: int
    names: dict[str, int]
    """How often each operation ran, the most frequent first; an operation of another library stands under `library::name`."""


class Operations(TorchDispatchMode):
    """Counts inside its block; see `count`."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()
        self.host_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.overloadpacket._qualified_op_name.partition("::")
        name = name if namespace == "aten" else f"{namespace}::{name}"
        result = func(*args, **(kwargs or {}))
        if name not in FREE and namespace != "prim":
            self.names[name] += 1
            self.host_reads += name in READS or (name in COPIES and _to_the_host(args, result))
        return result


def _to_the_host(args: tuple, result) -> bool:
    """Does a copy bring a device's values to the CPU? `copy_` writes into its first argument, which is its result."""
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    return source.device.type != "cpu" and all(t.device.type == "cpu" for t in tree_leaves(result) if isinstance(t, Tensor))


def count(run: Callable[[], object]) -> Count:
    """What `run` does, once."""
    with Operations() as seen:
        run()
    return Count(seen.names.total(), seen.host_reads, dict(seen.names.most_common()))
