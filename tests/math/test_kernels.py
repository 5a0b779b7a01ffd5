"""The passes over an output: PyTorch's implementation against float64, the choice between implementations, Triton end to end."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from doratune import UserError
from doratune.math import kernels
from doratune.math.kernels import fastest, torch_kernels

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv("DORATUNE_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "_requested", None)
    monkeypatch.setattr(kernels, "_said", set())


def inputs(T, O, R, dtype, bias=True, seed=0):
    torch.manual_seed(seed)
    gain = 0.3 * torch.randn(O).to(torch.float64 if dtype == torch.float64 else torch.float32)
    out, z, sB = (torch.randn(shape).to(dtype) for shape in ((T, O), (T, R), (O, R)))
    return out, gain, torch.randn(O).to(dtype) if bias else None, z, sB


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize("T", [0, 1, 7, 8, 70])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_compose(dtype, T, bias, fresh):
    out, gain, b, z, sB = inputs(T, 13, 3, dtype, bias)
    scaled = out.double() + gain.double() * (out.double() - (0 if b is None else b.double()))
    want = scaled + z.double() @ sB.double().T
    got = kernels.compose(out.clone(), gain, b, z, sB, fresh)
    assert got.dtype == dtype and got.shape == out.shape
    scale = scaled.abs() + z.double().abs() @ sB.double().T.abs() + (0 if b is None else b.double().abs())
    assert ((got.double() - want).abs() <= 3 * torch.finfo(dtype).eps * scale + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize("T", [1, 8, 70])
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_to_do_changes_no_bit(dtype, T, bias):
    out, gain, b, z, sB = inputs(T, 13, 3, dtype, bias)
    for fresh in (False, True):
        assert torch.equal(kernels.compose(out.clone(), torch.zeros_like(gain), b, z, torch.zeros_like(sB), fresh), out)


@pytest.mark.parametrize("dtype", LOW)
def test_small_gains_are_not_rounded_away(dtype):
    """g − 1 near −1 in a low precision would leave g with no digits."""
    for T in (2, 70):
        out, *_ = inputs(T, 5, 1, dtype)
        g = torch.tensor([1e-3, 5e-3, 0.02, 0.2, -1e-3])
        got, want = torch_kernels.scale_rows(out, g - 1, None).double(), out.double() * g.double()
        info = torch.finfo(dtype)
        assert (
            (got - want).abs() <= 1.1 * info.eps * want.abs() + 1e-6 * out.double().abs() + info.smallest_normal * info.eps
        ).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
@pytest.mark.parametrize("T", [0, 1, 8, 70, 300])
@pytest.mark.parametrize("layout", ["dense", "sliced"])
def test_compose_backward(dtype, T, layout):
    dY, gain, b, _, _ = inputs(T, 13, 1, dtype)
    kept = torch.randn(T, 13).to(dtype)
    if layout == "sliced":
        dY, kept = dY.repeat(1, 2)[:, :13], kept.repeat(2, 1)[:T]
        dY = torch.cat([dY, dY], 1)[:, :13]
    scaled, dot = kernels.compose_backward(dY, kept, gain, b)
    want = dY.double() * (1 + gain.double())
    assert scaled.dtype == dtype
    assert ((scaled.double() - want).abs() <= 2 * torch.finfo(dtype).eps * want.abs() + 1e-30).all()
    products = dY.double() * (kept.double() - b.double())
    low = dtype in LOW
    wide = torch.float32 if low else dtype
    size = (dY.double().abs() * (kept.double().abs() + b.double().abs())).sum(0)
    assert dot.dtype == wide
    assert ((dot.double() - products.sum(0)).abs() <= (T + 4) * torch.finfo(wide).eps * size + 1e-30).all()


def test_sums_over_many_rows_keep_their_digits():
    dY = torch.rand(20_000, 8)
    _, dot = kernels.compose_backward(dY, dY, torch.zeros(8), None)
    want = dY.double().square().sum(0)
    assert ((dot - want).abs() <= 1e-6 * want).all()


def test_results_may_be_changed_in_place():
    out, gain, b, z, sB = inputs(70, 13, 3, torch.bfloat16)
    for fresh in (False, True):
        y = kernels.compose(out.clone(), gain, b, z, sB, fresh)
        assert not y._is_view() and y.is_contiguous()


def test_select_says_why():
    choice = kernels.select(torch.device("cpu"), torch.float32)
    assert choice.implementation == "torch"
    assert "triton" in choice.reason.lower()
    kernels.use("torch")
    assert kernels.select(torch.device("cpu"), torch.float32) == ("torch", "asked for")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_request_that_cannot_be_met_raises(monkeypatch):
    with pytest.raises(UserError, match=r"kernel 'triton' cannot run here: .*; use 'auto' or 'torch'"):
        kernels.use("triton")
    monkeypatch.setenv("DORATUNE_KERNELS", "triton")
    with pytest.raises(UserError, match="'triton' cannot run here"):
        kernels.compose(torch.ones(2, 3), torch.zeros(3), None, None, None)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="did you mean 'triton'"):
        kernels.use("tritn")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_automatic_fallback_is_said_once(recwarn):
    for _ in range(3):
        assert kernels.select(torch.device("cuda"), torch.bfloat16).implementation == "torch"
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
from doratune.math import kernels

def gradients(name):
    kernels.use(name)
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
assert "bf16" in kernels._no_dtype(torch.bfloat16)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_triton.py runs the kernels themselves on the device")
def test_a_layer_on_triton(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", END_TO_END], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
