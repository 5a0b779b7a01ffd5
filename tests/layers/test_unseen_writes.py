"""Writes over a layer's output that no version counter shows: the gradients are those of the output that autograd knows.

Fused kernels and `.data` write like this. Autograd goes on with the gradient that arrives at y, so every gradient must be what it
would have been without the write.
"""

import pytest
import reference
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins import CASES, TOLERANCE, error, moved

import doratune

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at it

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
IN, OUT = 32, 24


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


class OwnForward(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, self.weight, self.bias)


def as_array(y):
    """The very memory of a tensor; numpy knows no bf16."""
    return y.detach().view(torch.int32 if y.dtype.itemsize == 4 else torch.int16).numpy()


WRITES = {
    "clamp_": lambda y: y.data.clamp_(-0.5, 0.5),
    "mul_": lambda y: y.data.mul_(0.7),
    "add_": lambda y: y.data.add_(1.0),
    "neg_": lambda y: y.data.neg_(),
    "copy_": lambda y: y.data.copy_(y.data.flip(0)),
    "zero_": lambda y: y.data.zero_(),
    "foreach": lambda y: torch._foreach_mul_([y.data], 0.7),
    "array": lambda y: as_array(y).__setitem__(..., as_array(y)[::-1].copy()),
    "array of zeros": lambda y: as_array(y).fill(0),
    "dlpack": lambda y: torch.from_dlpack(y.detach()).mul_(0.7),
    "storage": lambda y: torch.empty(0, dtype=y.dtype).set_(y.untyped_storage()).mul_(0.7),
    "NaN": lambda y: y.data.fill_(float("nan")),
}
KINDS = {
    "Linear": (lambda: nn.Linear(IN, OUT), (64, IN)),
    "Linear, no bias": (lambda: nn.Linear(IN, OUT, bias=False), (64, IN)),
    "Linear, 3 tokens": (lambda: nn.Linear(IN, OUT), (3, IN)),
    "Linear, 3-D": (lambda: nn.Linear(IN, OUT), (2, 32, IN)),
    "own forward": (lambda: OwnForward(IN, OUT), (64, IN)),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3), (2, 8, 7, 7)),
}
METHODS = {name: s for name, s in CASES.items() if s.get("method", "dora") in ("dora", "dvora", "dloha", "dlokr")}
METHODS["magnitude only"] = {"targets": [], "magnitude_only": ["0"]}


def built(kind, dtype, **settings):
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    config = doratune.AdapterConfig(**{"rank": 3, "alpha": 5.0, "targets": ["0"]} | settings)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return moved(doratune.attach(model, config)), x


def gradients(model, x, write=None, call=None):
    """{name: gradient} of the parameters and x, with `write` done to the output behind autograd's back."""
    x = x.clone().requires_grad_()
    y = (call or model)(x)
    weight = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    if write is not None:
        before = y.detach().clone()
        version = y._version
        write(y)
        assert y._version == version and not torch.equal(y.detach(), before), "written, and unseen"
    (y * weight).sum().backward()
    return {"x": x.grad} | {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(kind, dtype, write, call=lambda model: model, **settings):
    want = gradients(*built(kind, dtype, **settings))
    model, x = built(kind, dtype, **settings)
    got = gradients(model, x, WRITES[write], call(model))
    assert error(got, want) < TOLERANCE[dtype]
    exact, x = built(kind, torch.float64, **settings)
    for p, q in zip(exact.parameters(), model.parameters(), strict=True):
        p.data.copy_(q.data)
    truth = gradients(exact, x.to(dtype).double())
    assert error(got, truth) < 2 * TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", KINDS)
def test_written_over(kind, write, dtype):
    check(kind, dtype, write)


@DTYPES
@pytest.mark.parametrize("write", ["clamp_", "array"])
@pytest.mark.parametrize("kind", ["Linear", "own forward"])
@pytest.mark.parametrize("case", [name for name in METHODS if name != "dora"])
def test_every_method(case, kind, write, dtype):
    check(kind, dtype, write, **METHODS[case])


@pytest.mark.parametrize("write", ["clamp_", "mul_", "array"])
@pytest.mark.parametrize("kind", ["Linear", "own forward"])
def test_with_dropout(kind, write):
    check(kind, torch.float32, write, dropout=1e-9)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
@pytest.mark.parametrize("write", ["clamp_", "mul_"])
def test_partly_frozen(write, frozen):
    def freeze(model):
        getattr(model[0], frozen).requires_grad_(False)
        return model

    model, x = built("Linear", torch.float32)
    want = gradients(freeze(model), x)
    model, x = built("Linear", torch.float32)
    assert error(gradients(freeze(model), x, WRITES[write]), want) < 1e-5


@pytest.mark.parametrize("write", ["clamp_", "mul_", "array"])
@pytest.mark.parametrize("kind", ["Linear", "own forward"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_within_a_checkpoint(kind, write, reentrant):
    """The write is done again where the block runs again."""
    found = []
    for w in (WRITES[write], lambda y: None):
        model, x = built(kind, torch.float32)

        def block(x, model=model, w=w):
            y = model(x)
            w(y)
            return y * torch.linspace(-1, 1, y.numel()).view(y.shape)

        x.requires_grad_()
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        found.append({"x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert error(*found) < 1e-5


@pytest.mark.parametrize("write", ["clamp_", "array"])
@pytest.mark.parametrize("kind", ["Linear", "own forward"])
def test_after_a_compiled_layer(kind, write):
    check(kind, torch.float32, write, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"))


def test_with_a_change_that_is_seen():
    """One write of each sort, in either order."""
    for order in ((0, 1), (1, 0)):
        found = []
        for unseen in (True, False):
            model, x = built("Linear", torch.float32)
            y = model(x)
            for step in order:
                if step == 0:
                    y = y.relu_() if unseen else y.relu()
                elif unseen:
                    y.data.mul_(1.5)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert error(*found) < 1e-5, order


@DTYPES
def test_a_rotation_of_queries(dtype):
    """What fused rotary embeddings do: a rotation within each head, norms and sums of squares unchanged."""

    def rotate(y):
        a, b = y.data.view(*y.shape[:-1], -1, 2).float().unbind(-1)
        angle = torch.arange(len(y)).view(-1, 1) * 0.3 + 0.1
        y.data.copy_(torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2))

    want = gradients(*built("Linear", dtype))
    model, x = built("Linear", dtype)
    assert error(gradients(model, x, rotate), want) < TOLERANCE[dtype]


def test_against_the_dense_formula():
    model, x = built("Linear", torch.float64)
    got = gradients(model, x, WRITES["clamp_"])
    layer = model[0]
    t = [p.detach() for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.magnitude)]
    dY = torch.linspace(-1, 1, 64 * OUT).view(64, OUT).double()
    want = reference.gradients(x, dY, *t, layer.scaling)[1]
    names = {"x": "x", "A": "0.lora_A", "B": "0.lora_B", "m": "0.magnitude"}
    assert error({key: got[name] for key, name in names.items()}, want) < 1e-10
