"""The passes over an output: PyTorch's implementation against float64, the choice between implementations, Triton end to end."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from doratune import UserError
from doratune.layers import passes
from doratune.math import dora
from doratune.math.dora import Factors
from doratune.math.kernels import fastest

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv("DORATUNE_KERNELS", raising=False)
    monkeypatch.setattr(passes, "_requested", None)
    monkeypatch.setattr(passes, "_said", set())


def inputs(T, O, R, dtype, bias=True, seed=0):
    torch.manual_seed(seed)
    g = 1 + 0.3 * torch.randn(O).to(torch.float64 if dtype == torch.float64 else torch.float32)
    out, z, B = (torch.randn(shape).to(dtype) for shape in ((T, O), (T, R), (O, R)))
    return out, g, torch.randn(O).to(dtype) if bias else None, z, B


def factors(g, bias, low, B=None, A=None):
    """As `layers/prepared.py` makes them."""
    wide = g.dtype
    f = Factors.of(g=g, wide=wide, bias=None if bias is None else bias.to(wide))
    f.shift = None if bias is None else (1 - g) * f.bias
    f.g_minus_1 = (g - 1).to(low) if low != wide and g.abs().amin() >= 0.25 else None
    f.A_IR, f.B_RO = A, None if B is None else B.T
    return f


def composed(out, g, bias, z, B, fresh=False):
    """y for x = z and A = 1."""
    f = factors(g, bias, out.dtype, B, torch.eye(z.shape[1], dtype=out.dtype))
    return dora.forward(f, z, out.clone(), fresh=fresh)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize("T", [0, 1, 7, 8, 70])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_compose(dtype, T, bias, fresh):
    out, g, b, z, B = inputs(T, 13, 3, dtype, bias)
    b64 = 0 if b is None else b.double()
    scaled = g.double() * (out.double() - b64) + b64
    want = scaled + z.double() @ B.double().T
    got = composed(out, g, b, z, B, fresh)
    assert got.dtype == dtype and got.shape == out.shape
    scale = scaled.abs() + z.double().abs() @ B.double().T.abs() + (0 if b is None else b.double().abs())
    assert ((got.double() - want).abs() <= 3 * torch.finfo(dtype).eps * scale + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize("T", [1, 8, 70])
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_to_do_changes_no_bit(dtype, T, bias):
    out, g, b, z, B = inputs(T, 13, 3, dtype, bias)
    for fresh in (False, True):
        assert torch.equal(composed(out, torch.ones_like(g), b, z, torch.zeros_like(B), fresh), out)


@pytest.mark.parametrize("dtype", LOW)
def test_small_gains_are_not_rounded_away(dtype):
    """g − 1 near −1 in a low precision would leave g with no digits."""
    for T in (2, 70):
        out, *_ = inputs(T, 5, 1, dtype)
        g = torch.tensor([1e-3, 5e-3, 0.02, 0.2, -1e-3])
        got, want = dora.scale(factors(g, None, dtype), out).double(), out.double() * g.double()
        info = torch.finfo(dtype)
        assert (
            (got - want).abs() <= 1.1 * info.eps * want.abs() + 1e-6 * out.double().abs() + info.smallest_normal * info.eps
        ).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize("T", [0, 1, 8, 70, 300])
@pytest.mark.parametrize("layout", ["dense", "sliced"])
@pytest.mark.parametrize("bias", [True, False])
def test_scale_backward(dtype, T, layout, bias):
    dY, g, b, _, _ = inputs(T, 13, 1, dtype, bias)
    kept = torch.randn(T, 13).to(dtype)
    if layout == "sliced":
        dY, kept = dY.repeat(1, 2)[:, :13], kept.repeat(2, 1)[:T]
        dY = torch.cat([dY, dY], 1)[:, :13]
    scaled, dot = dora.scale_backward(factors(g, b, dtype), dY, kept)
    want, b64 = dY.double() * g.double(), 0 if b is None else b.double()
    assert scaled.dtype == dtype
    assert ((scaled.double() - want).abs() <= 2 * torch.finfo(dtype).eps * want.abs() + 1e-30).all()
    products = dY.double() * (kept.double() - b64)
    wide = torch.float32 if dtype in LOW else dtype
    size = (dY.double().abs() * (kept.double().abs() + abs(b64))).sum(0)
    assert dot.dtype == wide
    assert ((dot.double() - products.sum(0)).abs() <= (T + 4) * torch.finfo(wide).eps * size + 1e-30).all()


def test_sums_over_many_rows_keep_their_digits():
    dY = torch.rand(20_000, 8)
    _, dot = dora.scale_backward(factors(torch.ones(8), None, torch.float32), dY, dY)
    want = dY.double().square().sum(0)
    assert ((dot - want).abs() <= 1e-6 * want).all()


def test_results_may_be_changed_in_place():
    out, g, b, z, B = inputs(70, 13, 3, torch.bfloat16)
    for fresh in (False, True):
        y = composed(out, g, b, z, B, fresh)
        assert not y._is_view() and y.is_contiguous()


def test_select_says_why():
    choice = passes.select(torch.device("cpu"), torch.float32)
    assert choice.implementation == "torch"
    assert "triton" in choice.reason.lower()
    passes.use("torch")
    assert passes.select(torch.device("cpu"), torch.float32) == ("torch", "asked for")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_request_that_cannot_be_met_raises(monkeypatch):
    with pytest.raises(UserError, match=r"kernel 'triton' cannot run here: .*; use 'auto' or 'torch'"):
        passes.use("triton")
    monkeypatch.setenv("DORATUNE_KERNELS", "triton")
    with pytest.raises(UserError, match="'triton' cannot run here"):
        passes.kernels_for(torch.device("cpu"), torch.float32)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="did you mean 'triton'"):
        passes.use("tritn")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_automatic_fallback_is_said_once(recwarn):
    for _ in range(3):
        assert passes.select(torch.device("cuda"), torch.bfloat16).implementation == "torch"
    assert len([w for w in recwarn if "PyTorch's own kernels" in str(w.message)]) == 1


def test_the_fastest_is_measured_once_per_shape(monkeypatch):
    monkeypatch.setattr(fastest, "_chosen", {})
    calls, seconds = [], {"slow": 2.0, "quick": 1.0}

    def candidate(name):
        return lambda t: calls.append(name) or name

    def clock(run):
        return seconds[run()]

    tensor = torch.ones(100, 8)
    candidates = candidate("slow"), candidate("quick")
    assert fastest.call("op", (100, 8), tensor, candidates, (tensor,), clock) == "quick"
    assert calls == ["slow", "quick", "quick"]
    assert fastest.call("op", (128, 8), tensor, candidates, (tensor,), clock) == "quick"  # the same power of two
    assert calls == ["slow", "quick", "quick", "quick"]
    seconds["slow"] = 0.5
    assert fastest.call("op", (129, 8), tensor, candidates, (tensor,), clock) == "slow"
    assert fastest.call("op", (100, 8), tensor.bfloat16(), candidates, (tensor,), clock) == "slow"


END_TO_END = """
import torch, doratune
from torch import nn
from doratune.layers import passes

def gradients(name):
    passes.use(name)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40))
    doratune.attach(model, doratune.AdapterConfig(rank=3, targets=["0"]))
    with torch.no_grad():
        model[0].lora_B.normal_(0, 0.3)
        model[0].magnitude.mul_(1.2)
    x = torch.randn(17, 24, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

from doratune.math.kernels import triton_kernels
calls = []
for name in ("compose", "compose_backward"):
    inner = getattr(triton_kernels, name)
    setattr(triton_kernels, name, lambda *a, inner=inner, name=name: calls.append(name) or inner(*a))
plain, fused = gradients("torch"), gradients("triton")
assert calls == ["compose", "compose_backward"], calls
assert len(plain) == 5
for a, b in zip(plain, fused):
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
assert "bf16" in passes._no_dtype(torch.bfloat16)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_triton.py runs the kernels themselves on the device")
def test_a_layer_on_triton(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", END_TO_END], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
