"""An untrained adapter gives the base's output bit for bit, however the input lies in memory, with and without gradients.

The base's own kernels round differently for different layouts of one input, so a layer that flattens or copies its input before
the product is a rounding off. The base here is frozen, as under an adapter: PyTorch's product of a trained weight folds its input
in another way.
"""

import copy

import pytest
import torch
from torch import nn
from twins import CASES

import doratune

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SHAPES = ((13, 10), (64, 32), (24, 48))
GRADIENTS = pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])


def layouts(size):
    """name -> an input whose last dimension has this size."""
    torch.manual_seed(1)
    r = torch.randn
    return {
        "a vector": r(size),
        "contiguous": r(20, size),
        "one token": r(1, size),
        "3-D": r(3, 7, size),
        "transposed": r(size, 20).T,
        "transposed, 70 tokens": r(size, 70).T,
        "transposed, one token": r(size, 1).T,
        "transposed 3-D": r(3, size, 7).transpose(1, 2),
        "first two swapped": r(7, 3, size).transpose(0, 1),
        "permuted": r(size, 3, 7).permute(1, 2, 0),
        "permuted 4-D": r(2, size, 3, 5).permute(0, 2, 3, 1),
        "every other token": r(20, size)[::2],
        "every other token, 3-D": r(3, 20, size)[:, ::2],
        "every other feature": r(20, 2 * size)[:, ::2],
        "a part of the features": r(20, size + 6)[:, 3 : size + 3],
        "a part of the features, 3-D": r(3, 7, size + 6)[..., 6:],
        "the last token of each": r(3, 7, size)[:, -1:],
        "expanded tokens": r(1, size).expand(20, size),
        "expanded batch": r(1, 7, size).expand(3, 7, size),
        "expanded features": r(20, 1).expand(20, size),
        "4-D": r(2, 3, 5, size),
        "channels-last": r(2, 3, 5, size).contiguous(memory_format=torch.channels_last),
        "channels-last, features as channels": r(2, size, 3, 5).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        "an offset": r(20 * size + 1)[1:].view(20, size),
    }


def takes(plain, x):
    try:
        return plain(x) is not None
    except RuntimeError:  # transformers' Conv1D cannot view every input
        return False


def differing(model, plain, inputs, dtype, gradients):
    """The names of the inputs on which the two do not say the same bits, with x having a gradient and not; those that the base
    itself refuses are left out."""
    found = []
    for name, x in inputs.items():
        x = x.to(dtype)  # keeps the strides of a dense tensor
        for own_gradient in (True, False) if gradients else (False,):
            with torch.set_grad_enabled(gradients):
                x = x.detach().requires_grad_(own_gradient)
                if takes(plain, x) and not torch.equal(model(x), plain(x)):
                    found.append(name + ", with a gradient" * own_gradient)
    return found


def pair(rows, columns, bias, dtype, **settings):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(columns, rows, bias=bias)).to(dtype).requires_grad_(False)
    return doratune.attach(copy.deepcopy(plain), doratune.AdapterConfig(**{"rank": 3, "targets": ["0"]} | settings)), plain


START = {name: settings for name, settings in CASES.items() if "pissa" not in name and "olora" not in name}
START["magnitude only"] = {"targets": [], "magnitude_only": ["0"]}
START |= {"dora, dropout": {"dropout": 0.5}, "lora, dropout": {"method": "lora", "dropout": 0.5}}
OFFSETS = {name: settings for name, settings in CASES.items() if "pissa" in name or "olora" in name}


@GRADIENTS
@ALL_DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", ["dora", "dora, input", "lora"])
def test_every_layout(case, bias, dtype, gradients):
    found = {}
    for rows, columns in SHAPES:
        model, plain = pair(rows, columns, bias, dtype, **START[case])
        if names := differing(model, plain, layouts(columns), dtype, gradients):
            found[rows, columns] = names
    assert not found


@GRADIENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [*START, *OFFSETS])
def test_every_method(case, dtype, gradients):
    model, plain = pair(24, 48, True, dtype, **(START | OFFSETS)[case])
    assert not differing(model, plain, layouts(48), dtype, gradients)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", ["dora", "dora, input", "lora"])
def test_under_autocast_and_in_inference_mode(case, bias, autocast):
    model, plain = pair(24, 48, bias, torch.float32, **START[case])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert not differing(model, plain, layouts(48), torch.float32, autocast)
        with torch.inference_mode():
            assert [name for name, x in layouts(48).items() if not torch.equal(model(x), plain(x))] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", ["dora", "dora, input", "dvora", "lora", "lokr", "magnitude only"])
def test_verify_finds_it_exact(case, bias, dtype):
    model, _ = pair(24, 48, bias, dtype, **START[case])
    found = {}
    for name, x in layouts(48).items():
        report = doratune.verify(model, example=x.to(dtype))
        if not report.ok:
            found[name] = report.problems
    assert not found


class OwnForward(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, self.weight, self.bias)


def pictures():
    torch.manual_seed(2)
    x = torch.randn(2, 8, 6, 6)
    return {
        "contiguous": x,
        "channels-last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3),
        "strided": torch.randn(2, 8, 12, 6)[:, :, ::2],
        "expanded": x[:1].expand(2, 8, 6, 6),
        "unbatched": x[0],
        "permuted": torch.randn(2, 6, 6, 8).permute(0, 3, 1, 2),
    }


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(24, 48)


OTHERS = {
    "own forward": (lambda: OwnForward(48, 24), lambda: layouts(48)),
    "own forward, no bias": (lambda: OwnForward(48, 24, bias=False), lambda: layouts(48)),
    "Conv1D": (conv1d, lambda: {name: x for name, x in layouts(48).items() if x.dim() > 1}),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1), pictures),
    "Conv2d, no bias": (lambda: nn.Conv2d(8, 6, 3, bias=False), pictures),
    "Conv2d, 1 x 1": (lambda: nn.Conv2d(8, 6, 1), pictures),
    "Embedding": (lambda: nn.Embedding(9, 6), lambda: {"plain": torch.arange(8), "transposed": torch.arange(8).view(2, 4).T}),
}


@GRADIENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", ["dora", "dora, input", "lora"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds(kind, case, dtype, gradients):
    if kind.startswith("Conv2d") and "1 x 1" not in kind and case == "dora, input":
        pytest.skip("refused: docs/support.md")
    torch.manual_seed(0)
    make, inputs = OTHERS[kind]
    plain = nn.Sequential(make()).to(dtype).requires_grad_(False)
    model = doratune.attach(copy.deepcopy(plain), doratune.AdapterConfig(**{"rank": 3, "targets": ["0"]} | START[case]))
    if kind == "Embedding":
        assert all(torch.equal(model(ids), plain(ids)) for ids in inputs().values())
    else:
        assert not differing(model, plain, inputs(), dtype, gradients)


@GRADIENTS
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", ["dora", "dora, input", "lora"])
def test_attention(case, batch_first, gradients):
    """Against PyTorch's own way with gradients and in training; in evaluation without them it takes a fused function."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"0": nn.MultiheadAttention(48, 4, batch_first=batch_first)}).train().requires_grad_(False)
    model = doratune.attach(copy.deepcopy(plain), doratune.AdapterConfig(**{"rank": 3, "targets": ["0"]} | START[case]))
    with torch.set_grad_enabled(gradients):
        for name, x in layouts(48).items():
            if x.dim() == 3:
                got, want = (m["0"](x, x, x, need_weights=False)[0] for m in (model, plain))
                assert torch.equal(got, want), name
