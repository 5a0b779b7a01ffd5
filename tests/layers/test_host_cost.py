"""What a layer costs the host: operations that PyTorch dispatches, counted, not timed; and reads that make the host wait.

Small layers are bound by dispatch. Counted are operations with work to do: views, allocations and detached aliases are not. One
layer is counted within a model of several, called through its root: what a call prepares for all layers together is the root's.
"""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import doratune

FREE = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unbind",
        "split",
    ),
    *(
        "as_strided",
        "alias",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "squeeze",
        "unsqueeze",
    ),
}
READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}
WIDTH, LAYERS = 64, 5


class Operations(TorchDispatchMode):
    """names: how often each operation ran, reads and free ones included; inside: the same for each span between marks."""

    def __init__(self):
        super().__init__()
        self.all, self.inside, self.layer = [], {}, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.all.append(name)
        if self.layer is not None:
            self.inside[self.layer].append(name)
        return func(*args, **(kwargs or {}))


def work(names):
    return Counter(name for name in names if name.removesuffix("_out") not in FREE and name not in READS)


def reads(names):
    return Counter(name for name in names if name in READS)


def stack(layers=LAYERS, dtype=torch.float32, bias=False, **settings):
    """(a model of layers alone, an input); adapted, away from its start."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(layers))).to(dtype)
    targets = [str(i) for i in range(layers)]
    doratune.attach(model, doratune.AdapterConfig(**{"rank": 8, "targets": targets} | settings))
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            p.data.add_(0.01 * torch.randn(p.shape))
        elif p.requires_grad:
            p.data.mul_(1.03)
        elif "bias" in name:
            p.data.mul_(0.01)  # a bias that does not drown the rest
    return model


def marked(model, operations):
    """The model with each layer's forward marked, so that its operations are known from those of the root."""

    def enter(layer, args):
        operations.layer = layer
        operations.inside.setdefault(layer, [])

    def leave(layer, args, output):
        operations.layer = None

    return [h for layer in model for h in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))]


def train_step(model, x, optimizer=None):
    model(x).float().square().mean().backward()
    if optimizer is not None:
        optimizer.step()
    for p in model.parameters():
        p.grad = None


def forward_operations(model, x):
    """The operations of a forward: [each layer's], all."""
    operations = Operations()
    handles = marked(model, operations)
    with operations:
        y = model(x)
    for handle in handles:
        handle.remove()
    return list(operations.inside.values()), operations.all, y


def per_layer_backward(dtype, bias, **settings):
    """Operations of one inner layer's backward: a model of 5 layers' less a model of 3's, halved."""
    counts = []
    for layers in (3, 5):
        model = stack(layers, dtype, bias, **settings)
        x = torch.randn(16, WIDTH, dtype=dtype)
        train_step(model, x)
        y, operations = model(x), Operations()
        with operations:
            y.backward(torch.ones_like(y))
        counts.append(work(operations.all))
    more = counts[1] - counts[0]
    assert not counts[0] - counts[1] and all(n % 2 == 0 for n in more.values())
    return Counter({name: n // 2 for name, n in more.items()})


SETTINGS = {
    "bf16": (torch.bfloat16, False, {}),
    "bf16, bias": (torch.bfloat16, True, {}),
    "fp32": (torch.float32, False, {}),
    "fp32, bias": (torch.float32, True, {}),
    "bf16, dropout": (torch.bfloat16, False, {"dropout": 0.1}),
}
MORE = {
    "bf16, bias": {"forward": 1, "backward": 2, "decode": 1},
    "fp32, bias": {"forward": 1, "backward": 2, "decode": 1},
    "bf16, dropout": {"forward": 3, "backward": 2},
}
"""Beyond `LIMITS`. Bias: out − bias is an operation, and its sum is one; dropout: the mask is drawn, made Boolean and multiplied
in, in the backward twice."""
LIMITS = {"dora": {"forward": 5, "backward": 11, "decode": 4}, "lora": {"forward": 3, "backward": 8, "decode": 3}}


def limit(method, what, name):
    return LIMITS[method][what] + MORE.get(name, {}).get(what, 0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("method", LIMITS)
def test_operations_of_a_forward(method, name):
    dtype, bias, settings = SETTINGS[name]
    model = stack(LAYERS, dtype, bias, method=method, **settings)
    x = torch.randn(16, WIDTH, dtype=dtype)
    train_step(model, x)  # and no optimizer: nothing to prepare
    layers, _, _ = forward_operations(model, x)
    for names in layers[1:]:  # the first one's input has no gradient
        assert sum(work(names).values()) <= limit(method, "forward", name), work(names)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("method", LIMITS)
def test_operations_of_a_backward(method, name):
    dtype, bias, settings = SETTINGS[name]
    found = per_layer_backward(dtype, bias, method=method, **settings)
    assert sum(found.values()) <= limit(method, "backward", name), found


@pytest.mark.parametrize("name", [name for name in SETTINGS if "dropout" not in name])
@pytest.mark.parametrize("method", LIMITS)
def test_operations_of_a_decode(method, name):
    dtype, bias, settings = SETTINGS[name]
    model, x = stack(LAYERS, dtype, bias, method=method).eval(), torch.randn(4, WIDTH, dtype=dtype)
    with torch.no_grad():
        model(x)
        for names in forward_operations(model, x)[0]:
            assert sum(work(names).values()) <= limit(method, "decode", name), work(names)


@pytest.fixture
def host_reads(monkeypatch):
    """Reads that dispatch nothing: a tensor on the CPU as a list, and as an array."""
    found = []
    for name in ("tolist", "numpy", "__array__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, _o=original, _n=name, **k: found.append(_n) or _o(t, *a, **k))
    return found


@pytest.mark.parametrize("state", ["as before", "after a step", "decode", "decode after a step"])
@pytest.mark.parametrize("name", ["bf16", "fp32, bias", "bf16, dropout"])
@pytest.mark.parametrize("method", ["dora", "lora", "dvora"])
def test_reads_by_the_host(method, name, state, host_reads):
    """None within a layer, one at most in a whole forward, and none in a backward."""
    dtype, bias, settings = SETTINGS[name]
    model, x = stack(LAYERS, dtype, bias, method=method, **settings), torch.randn(4, WIDTH, dtype=dtype)
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-3))
    train_step(model, x, optimizer)
    if "decode" in state:
        model.eval()
    with torch.set_grad_enabled("decode" not in state):
        model(x)
    if "step" in state:
        train_step(model.train(), x, optimizer)
        model.train("decode" not in state)
    host_reads.clear()
    with torch.set_grad_enabled("decode" not in state):
        layers, everything, y = forward_operations(model, x)
    assert sum((reads(names) for names in layers), Counter()) == Counter()
    assert sum(reads(everything).values()) + len(host_reads) <= 1, (reads(everything), host_reads)
    if y.requires_grad:
        host_reads.clear()
        with Operations() as operations:
            y.backward(torch.ones_like(y))
        assert reads(operations.all) == Counter() and not host_reads
