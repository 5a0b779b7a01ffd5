"""The counter of operations and host reads, on functions whose operations are known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from doratune.bench.operations import Operations, count

W, x = torch.randn(4, 3), torch.randn(5, 3)


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lambda: x @ W.T, {"mm": 1}),
        (lambda: F.linear(x, W, torch.zeros(4)), {"zeros": 1, "addmm": 1}),
        (lambda: x.view(3, 5).t().reshape(-1)[2:].unsqueeze(0), {"clone": 1}),  # the reshape of a transposed one copies
        (lambda: x.detach().expand(2, 5, 3)[0].unbind(0), {}),
        (lambda: torch.empty(3).new_empty(2), {}),
        (lambda: torch.empty_like(x).fill_(1), {"fill_": 1}),
        (lambda: x.clone().mul_(2).to(torch.bfloat16), {"clone": 1, "mul_": 1, "_to_copy": 1}),
        (lambda: x.clone().copy_(x), {"clone": 1, "copy_": 1}),
        (lambda: torch._foreach_mul([x, W, x], 2), {"_foreach_mul": 1}),
        (lambda: x.to(torch.float32), {}),  # of that dtype already
    ],
)
def test_exact_counts(run, names):
    found = count(run)
    assert found.names == names
    assert found.operations == sum(names.values()) and found.host_reads == 0


@pytest.mark.parametrize(
    ("run", "reads"),
    [
        (lambda: x.sum().item(), 1),
        (lambda: bool((x > 0).any()), 1),
        (lambda: x.tolist() and float(x[0, 0]), 1),  # tolist reads the memory of a CPU tensor without an operation
        (lambda: torch.equal(x, x), 1),
        (lambda: x.nonzero(), 1),
        (lambda: x.cpu().to(torch.float64), 0),
        (lambda: x.clone().copy_(x), 0),
    ],
)
def test_host_reads(run, reads):
    assert count(run).host_reads == reads


def test_a_copy_from_a_device_to_the_cpu_is_a_read():
    meta, seen = torch.empty(2, device="meta"), Operations()
    to_copy, copy_ = torch.ops.aten._to_copy, torch.ops.aten.copy_

    class Result:
        """In place of an operation that this machine has no device for."""

        def __init__(self, packet, result):
            self.overloadpacket, self.result = packet, result

        def __call__(self, *_, **__):
            return self.result

    seen.__torch_dispatch__(Result(to_copy, x), (), (meta,))
    seen.__torch_dispatch__(Result(copy_, x), (), (x, meta))
    assert seen.host_reads == 2
    seen.__torch_dispatch__(Result(copy_, meta), (), (meta, x))
    seen.__torch_dispatch__(Result(to_copy, meta), (), (x,))
    assert seen.host_reads == 2 and seen.names == {"_to_copy": 2, "copy_": 2}


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return t * 2

    @staticmethod
    def backward(ctx, dy):
        return (dy + dy).neg()


def test_autograd_functions_are_seen_from_outside():
    t = torch.randn(3, requires_grad=True)
    y = []
    assert count(lambda: y.append(Twice.apply(t))).names == {"mul": 1}
    assert count(lambda: y[0].backward(torch.ones(3))).names == {"ones": 1, "add": 1, "neg": 1}


def test_a_linear_layer_forward_and_backward():
    layer, t = nn.Linear(3, 4, bias=False), torch.randn(5, 3, requires_grad=True)
    dY, y = torch.ones(5, 4), []
    assert count(lambda: y.append(layer(t))).names == {"mm": 1}
    assert count(lambda: y[0].backward(dY)).names == {"mm": 2}  # dx and dW, both taken over as gradients
