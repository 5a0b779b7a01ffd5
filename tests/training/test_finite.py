"""Whether trained numbers are finite is asked once a step: one read of the host, however many tensors there are."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from doratune.training.sharded import finite

FINITE = [
    torch.randn(3, 4),
    torch.randn(5).bfloat16(),
    torch.empty(0, 3),
    torch.full((2,), 3e38),
    torch.tensor([1e300], dtype=torch.float64),
]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_number_that_is_not_is_seen(number, dtype):
    assert finite(FINITE) and finite([])
    spoiled = torch.ones(40, dtype=dtype)
    spoiled[17] = number
    assert not finite([*FINITE, spoiled])


def test_one_read_for_all_tensors():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    with Reads() as reads:
        assert finite(torch.randn(6) for _ in range(300))
    assert reads.count == 1
