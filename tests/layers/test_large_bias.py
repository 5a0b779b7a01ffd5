"""m's gradient behind a bias that is far larger than the rest of the output: dm is a sum over x·Wᵀ + s·x·(B·A)ᵀ, without the bias.

Compared with the same model in float64, whose digits carry any of these biases, given the very same dY. The error is that of the
whole vector; in bf16 1 % is some three roundings of a term, in fp32 1e-4 leaves room for none of the bias's.
"""

import pytest
import reference
import torch
import torch._dynamo
from torch import nn
from twins import CASES, error, moved, values

import doratune

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at it

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SIZES = pytest.mark.parametrize("size", [30.0, 300.0])
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
TOKENS, IN, OUT = 64, 32, 32


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


class OwnForward(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, self.weight, self.bias)


def conv1d(*_):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(OUT, IN)


KINDS = {
    "Linear": (lambda: nn.Linear(IN, OUT), (TOKENS, IN), {}),
    "Linear, a few tokens": (lambda: nn.Linear(IN, OUT), (5, IN), {}),
    "Linear, 3-D": (lambda: nn.Linear(IN, OUT), (2, TOKENS // 2, IN), {}),
    "own forward": (lambda: OwnForward(IN, OUT), (TOKENS, IN), {}),
    "Conv1D": (conv1d, (TOKENS, IN), {}),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3), (2, 8, 7, 7), {}),
    "Conv2d, 1 x 1": (lambda: nn.Conv2d(IN, OUT, 1), (1, IN, 8, 8), {}),
    "Conv2d, groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 7, 7), {}),
    "Linear, dropout": (lambda: nn.Linear(IN, OUT), (TOKENS, IN), {"dropout": 1e-9}),
    "own forward, dropout": (lambda: OwnForward(IN, OUT), (TOKENS, IN), {"dropout": 1e-9}),
    **{name: (lambda: nn.Linear(IN, OUT), (TOKENS, IN), CASES[name]) for name in CASES if "lora" not in name and name != "dora"},
}
for _name in ("vera", "loha", "lokr", "dora, input", "dora, input, full", "dvora, input"):
    KINDS.pop(_name)  # without a magnitude, or with one in front of the layer, where there is no bias yet
KINDS["magnitude only"] = (*KINDS["magnitude only"][:2], {"targets": [], "magnitude_only": ["0"]})


def built(kind, dtype):
    make, shape, settings = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    return doratune.attach(model, doratune.AdapterConfig(**{"rank": 3, "alpha": 5.0, "targets": ["0"]} | settings)), shape


def twin(kind, model):
    """The model in float64."""
    exact = built(kind, torch.float64)[0].train(model.training)
    exact.load_state_dict(values(model))
    return exact


@torch.no_grad()
def biased(kind, model, shape, size):
    """The model with a bias of `size` times the rest of its output, of either sign, differing from row to row."""
    bias, rest = model[0].bias, twin(kind, model)
    rest[0].bias.zero_()
    y = rest(torch.randn(shape, generator=torch.Generator().manual_seed(1)).double())
    spread = torch.empty(len(bias)).uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    signs = torch.where(torch.arange(len(bias)) % 3 == 0, -1.0, 1.0)
    bias.copy_(size * y.square().mean().sqrt() * spread * signs)
    return model


def inputs(shape, model, seed=3, scale=1.0):
    """(x, dY) in the model's dtype."""
    dtype = model[0].weight.dtype
    x = (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    with torch.no_grad():
        y = model(x)
    return x, torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 100)).to(dtype)


def magnitude_gradients(kind, model, call, x, dY):
    """{name: gradient} of the magnitude and, where the norm is differentiated, of the rest."""
    call(x).backward(dY)
    found = {}
    for name, p in model[0].named_parameters(recurse=False):
        if p.grad is not None:
            if name.startswith("magnitude") or KINDS[kind][2].get("norm_gradient") == "full":
                found[name] = p.grad.clone()
            p.grad = None
    assert found
    return found


def check(kind, model, call, x, dY):
    exact = twin(kind, model)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        q.requires_grad_(p.requires_grad)
    want = magnitude_gradients(kind, exact, exact, x.double(), dY.double())
    got = magnitude_gradients(kind, model, call, x, dY)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert error(got[name], gradient) < CLOSE[x.dtype], name


@DTYPES
@SIZES
@pytest.mark.parametrize("kind", KINDS)
def test_behind_a_large_bias(kind, size, dtype):
    model, shape = built(kind, dtype)
    biased(kind, moved(model.train()), shape, size)
    check(kind, model, model, *inputs(shape, model))


@pytest.mark.parametrize("size", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("kind", ["Linear", "Linear, a few tokens", "own forward", "Conv2d", "dvora", "magnitude only"])
def test_behind_a_bias_of_ordinary_size(kind, size):
    """Below every threshold that a guess of the output's size might have."""
    test_behind_a_large_bias(kind, size, torch.bfloat16)


@DTYPES
@pytest.mark.parametrize("kind", ["Linear", "own forward", "Conv1D", "dvora", "magnitude only"])
def test_quiet_tokens_alone_have_a_gradient(kind, dtype):
    """Loud ones, masked in the loss, say nothing about how large the outputs are that dm is made of."""
    model, shape = built(kind, dtype)
    biased(kind, moved(model), shape, 100.0)
    x, dY = inputs(shape, model)
    x[::2] *= 300
    dY[::2] = 0
    check(kind, model, model, x, dY)


@DTYPES
@pytest.mark.parametrize("kind", ["Linear", "own forward", "Conv1D", "magnitude only"])
def test_inputs_that_a_weight_hardly_sees(kind, dtype):
    """A weight of low rank and inputs beside it: its outputs are far smaller than |m|·|x| lets expect."""
    model, shape = built(kind, dtype)
    layer, across = model[0], torch.linalg.qr(torch.randn(IN, IN, generator=torch.Generator().manual_seed(0)))[0]
    seen, unseen = across[:, :8] @ across[:, :8].T, across[:, 8:] @ across[:, 8:].T
    with torch.no_grad():
        W = layer.weight.T if kind == "Conv1D" else layer.weight
        W.copy_(W.float() @ seen)
        exact = twin(kind, model)
        layer.magnitude.copy_((exact[0].weight.T if kind == "Conv1D" else exact[0].weight).norm(dim=1))
        x, dY = inputs(shape, model)
        x = (100 * x.float() @ unseen + x.float()).to(dtype)
        exact[0].bias.zero_()
        rest = exact(x.double())
        layer.bias.copy_(100 * rest.square().mean().sqrt() * torch.where(torch.arange(OUT) % 3 == 0, -1.0, 1.0))
    check(kind, model, model, x, dY)


def test_float64_carries_it():
    """What everything here is compared with agrees with the dense formula."""
    model, shape = built("Linear", torch.float64)
    x, dY = inputs(shape, biased("Linear", moved(model), shape, 300.0))
    layer = model[0]
    got = magnitude_gradients("Linear", model, model, x, dY)["magnitude"]
    t = [p.detach() for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.magnitude)]
    assert error(got, reference.gradients(x, dY, *t, layer.scaling)[1]["m"]) < 1e-10


@DTYPES
@SIZES
@pytest.mark.parametrize("kind", ["Linear", "own forward", "Conv2d", "dvora", "magnitude only"])
@pytest.mark.parametrize("frozen", ["first", "all but m"])
def test_partly_frozen(kind, frozen, size, dtype):
    """With A frozen x is not kept for dA; with all frozen but m nothing else is kept at all."""
    model, shape = built(kind, dtype)
    biased(kind, moved(model), shape, size)
    own = [p for name, p in model[0].named_parameters(recurse=False) if p.requires_grad and name != "magnitude"]
    for p in own[:1] if frozen == "first" else own:
        p.requires_grad_(False)
    check(kind, model, model, *inputs(shape, model))


@DTYPES
@SIZES
@pytest.mark.parametrize("make", [nn.Linear, OwnForward])
def test_with_real_dropout(make, size, dtype):
    """At B = 0 dm does not depend on what was dropped."""
    torch.manual_seed(0)
    model = nn.Sequential(make(IN, OUT)).to(dtype)
    doratune.attach(model, doratune.AdapterConfig(rank=3, targets=["0"], dropout=0.5))
    with torch.no_grad():
        model[0].magnitude.mul_(1.3)
    biased("Linear", model.train(), (TOKENS, IN), size)
    check("Linear", model, model, *inputs((TOKENS, IN), model))


@pytest.mark.parametrize(
    ("kind", "size", "dtype"),
    [
        *(("Linear", size, dtype) for size in (30.0, 300.0) for dtype in CLOSE),
        *(
            (kind, 300.0, torch.bfloat16)
            for kind in ("own forward", "Conv2d", "dvora", "magnitude only", "Conv1D", "Linear, dropout")
        ),
        *((kind, 300.0, torch.float32) for kind in ("Conv2d", "dvora")),
    ],
)
def test_compiled(kind, size, dtype):
    model, shape = built(kind, dtype)
    biased(kind, moved(model.train()), shape, size)
    x, dY = inputs(shape, model)
    check(kind, model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, dY)


SCALES = {torch.float32: (1.0, 100.0, 1.0, 100.0, 1.0), torch.bfloat16: (1.0, 100.0, 1.0, 0.01, 1.0)}
"""In fp32 the bias is never more than `size` times the rest: beyond, its own rounding is 1e-4 of an output."""


@DTYPES
@SIZES
@pytest.mark.parametrize("kind", ["Linear", "own forward", "Conv2d", "dvora"])
def test_steps_in_a_row(kind, size, dtype):
    """Inputs whose scale changes a hundredfold from step to step, and an optimizer that moves m: no step may rely on the last."""
    model, shape = built(kind, dtype)
    biased(kind, moved(model), shape, size)
    optimizer = torch.optim.SGD(doratune.parameter_groups(model, lr=1e-3))
    for step, scale in enumerate(SCALES[dtype]):
        x, dY = inputs(shape, model, seed=step, scale=scale)
        check(kind, model, model, x, dY)
        model(x / scale).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@DTYPES
@pytest.mark.parametrize("kind", ["Linear"])
def test_compiled_steps_in_a_row(kind, dtype):
    model, shape = built(kind, dtype)
    biased(kind, moved(model), shape, 300.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step, scale in enumerate(SCALES[dtype]):
        check(kind, model, compiled, *inputs(shape, model, seed=step, scale=scale))
        moved(model, step)


def test_a_bias_that_grows_between_steps():
    """Nothing decided once about a layer may outlive its bias."""
    for edit in (lambda b: b.mul_(300.0), lambda b: b.data.mul_(300.0)):
        model, shape = built("Linear", torch.bfloat16)
        biased("Linear", moved(model), shape, 1.0)
        check("Linear", model, model, *inputs(shape, model))
        with torch.no_grad():
            edit(model[0].bias)
        check("Linear", model, model, *inputs(shape, model))


@DTYPES
@SIZES
@pytest.mark.parametrize("case", ["dora", "dvora", "dora, full"])
@pytest.mark.parametrize("cross", [False, True])
def test_packed_attention(case, cross, size, dtype):
    """The values' third of in_proj_bias large (there the softmax does not depend on it), with their rows of dm compared."""

    def make(dtype):
        torch.manual_seed(0)
        model = nn.ModuleDict({"0": nn.MultiheadAttention(IN, 4, batch_first=True)}).to(dtype)
        doratune.attach(model, doratune.AdapterConfig(**{"rank": 3, "targets": ["0"]} | CASES[case]))
        return model

    model = moved(make(dtype))
    layer, values_ = model["0"], slice(2 * IN, 3 * IN)
    with torch.no_grad():
        layer.in_proj_bias[values_] = size * torch.linspace(0.5, 1.5, IN) * torch.where(torch.arange(IN) % 3 == 0, -1.0, 1.0)
    exact = make(torch.float64)
    exact.load_state_dict(values(model))
    x = torch.randn(2, 2, 24, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    dY, found = torch.randn(2, 24, IN, generator=torch.Generator().manual_seed(2)).to(dtype), []
    for m in (model, exact):
        a, b = x.to(m["0"].in_proj_weight.dtype)
        m["0"](a, b if cross else a, b if cross else a)[0].backward(dY.to(a.dtype))
        found.append(m["0"].magnitude.grad[values_])
    assert error(*found) < CLOSE[dtype]
