"""Forward, all gradients, norm and merge against the float64 reference, away from the start."""

import itertools

import pytest
import reference
import torch
from conftest import one_layer, randomize

import doratune

AXES, MODES = ("output", "input"), ("detached", "full")
FACTOR = 3.0
"""Our error may be this many times that of dense V in the same dtype."""


def tensors(layer):
    A, B, m = layer.lora_A, layer.lora_B, layer.magnitude
    return layer.weight, layer.bias, A, B, m, layer.scaling


def run(layer, x, dY):
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dY.reshape(y.shape))
    names = {"A": "lora_A", "B": "lora_B", "m": "magnitude"}
    grads = {k: getattr(layer, n).grad for k, n in names.items() if getattr(layer, n) is not None}
    return y.detach(), grads | {"x": x.grad}


def error(a, b):
    return (a.double() - b.double()).norm().item()


def check_close_to_reference(layer, x, dY, axis, full, dtype, factor=FACTOR):
    """Ours against float64, measured in errors of dense V in the same dtype."""
    W, bias, A, B, m, s = tensors(layer)
    flat, dY_flat = x.reshape(-1, x.shape[-1]), dY.reshape(-1, dY.shape[-1])
    exact_y, exact = reference.gradients(flat, dY_flat, W, bias, A, B, m, s, axis, full)
    dense_y, dense = reference.gradients(flat, dY_flat, W, bias, A, B, m, s, axis, full, dtype)
    y, grads = run(layer, x, dY)
    assert y.dtype == dtype
    assert set(grads) == set(exact)
    ours, theirs = {"y": y.reshape(dense_y.shape)} | grads, {"y": dense_y} | dense
    for name, value in ({"y": exact_y} | exact).items():
        floor = torch.finfo(dtype).eps * value.norm().item()
        got = ours[name].reshape(value.shape)
        assert torch.isfinite(got).all(), name
        assert error(got, value) <= factor * max(error(theirs[name], value), floor), name


CASES = list(itertools.product(AXES, MODES, (torch.float32, torch.bfloat16, torch.float16), (True, False)))


@pytest.mark.parametrize(("axis", "mode", "dtype", "bias"), CASES)
def test_forward_and_gradients(axis, mode, dtype, bias):
    model, layer = one_layer(37, 29, bias, dtype, rank=5, magnitude_axis=axis, norm_gradient=mode)
    randomize(model)
    x, dY = torch.randn(3, 11, 29).to(dtype), torch.randn(3, 11, 37).to(dtype)
    check_close_to_reference(layer, x, dY, axis, mode == "full", dtype)


@pytest.mark.parametrize(("axis", "mode"), itertools.product(AXES, MODES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_tiny_rows(axis, mode, dtype):
    model, layer = one_layer(24, 20, True, dtype, rank=4, magnitude_axis=axis, norm_gradient=mode)
    doratune.detach(model)
    with torch.no_grad():
        view = model.layer.weight if axis == "output" else model.layer.weight.T
        view[3] = 0.0
        view[7] = 1e-9
    doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["layer"], magnitude_axis=axis, norm_gradient=mode))
    randomize(model)
    x, dY = torch.randn(17, 20).to(dtype), torch.randn(17, 24).to(dtype)
    check_close_to_reference(model.layer, x, dY, axis, mode == "full", dtype)
    assert (model.layer.magnitude.grad[[3, 7]] == 0).all()


@pytest.mark.parametrize(("axis", "mode"), itertools.product(AXES, MODES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cancellation(axis, mode, dtype):
    """BA ≈ −0.96·W in some rows: U's rounding alone would be of the size of n."""
    model, layer = one_layer(16, 12, True, dtype, rank=12, alpha=12.0, magnitude_axis=axis, norm_gradient=mode)
    with torch.no_grad():
        W = layer.weight.float()
        layer.lora_A.copy_(torch.eye(12))
        layer.lora_B.copy_(0.1 * torch.randn(16, 12))
        if axis == "output":
            layer.lora_B[2:5] = -0.96 * W[2:5]
        else:
            layer.lora_B[:, 2:5] = -0.96 * W[:, 2:5]
        layer.magnitude.mul_(1.2)
    x, dY = torch.randn(9, 12).to(dtype), torch.randn(9, 16).to(dtype)
    site = layer.adapted
    A, B = layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    terms = site.terms(A, B)
    exact = reference.norm(layer.weight, A, B, layer.scaling, axis)
    assert ((terms.n.double() - exact).abs() / exact).max() < 1e-4
    assert set(terms.redone.tolist()) >= {2, 3, 4}
    kappa = ((exact.square() + reference.row_norm(layer.weight.double(), axis).square()) / exact.square()).max().item()
    check_close_to_reference(layer, x, dY, axis, mode == "full", dtype, FACTOR * kappa**0.5)


@pytest.mark.parametrize("axis", AXES)
def test_redone_rows_count_in_the_full_gradient(axis):
    """Where V almost vanishes, V·Aᵀ from a bf16 U is noise; from fp32 tiles it is not."""
    from doratune.math import norm

    _, layer = one_layer(16, 12, True, torch.bfloat16, rank=12, alpha=12.0, magnitude_axis=axis, norm_gradient="full")
    W = layer.weight.detach()
    A = torch.linalg.qr(torch.randn(12, 12)).Q.bfloat16()
    B = (-0.98 * W.float() @ torch.linalg.inv(A.float())).bfloat16()
    site = layer.adapted
    index = site.terms(A, B).redone
    assert len(index) == (16 if axis == "output" else 12)
    V, c = W.double() + B.double() @ A.double(), torch.ones(16 if axis == "output" else 12)
    exact = -V @ A.double().T if axis == "output" else V @ A.double().T
    gradient = norm.full_gradient_output if axis == "output" else norm.full_gradient_input
    _, dB = gradient(layer.adapted, A, B, 1.0, c, index)
    assert error(dB, exact) < 1e-4 * exact.norm()


@pytest.mark.parametrize("axis", AXES)
def test_cancellation_within_the_update(axis):
    """Near-collinear factors with opposite signs: B·A is small, its factored square is a difference of large numbers."""
    model, layer = one_layer(32, 64, rank=2, alpha=2.0, magnitude_axis=axis)
    for size in (10.0, 1000.0):
        with torch.no_grad():
            if axis == "output":
                layer.lora_A[1] = layer.lora_A[0] + torch.randn(64) / 400
                layer.lora_B[:, 0], layer.lora_B[:, 1] = size, -size
            else:
                layer.lora_B[:, 0] = size
                layer.lora_B[:, 1] = size + torch.randn(32) / 400
                layer.lora_A[1] = -layer.lora_A[0]
        n = layer.adapted.terms(layer.lora_A, layer.lora_B).n
        exact = reference.norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling, axis)
        dense = reference.row_norm(layer.weight + layer.scaling * layer.lora_B @ layer.lora_A, axis)
        ours, theirs = (((t.double() - exact).abs() / exact).max().item() for t in (n, dense))
        assert ours <= max(FACTOR * theirs, 1e-5)


def test_a_norm_that_vanishes_is_clamped():
    """V = 0 in an ordinary row: n is held at 1e-6·w, everything stays finite."""
    model, layer = one_layer(6, 6, rank=6, alpha=6.0)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(6))
        layer.lora_B[4] = -layer.weight[4]
    terms = layer.adapted.terms(layer.lora_A, layer.lora_B)
    assert terms.clamped.tolist() == [i == 4 for i in range(6)]
    torch.testing.assert_close(terms.n[4], 1e-6 * layer.weight[4].norm(), rtol=1e-4, atol=0)
    y, grads = run(layer, torch.randn(3, 6), torch.randn(3, 6))
    assert all(torch.isfinite(t).all() for t in (y, *grads.values()))


def test_tiny_gradients_survive_in_fp16():
    """The full gradient sends (c ⊙ B)ᵀ through an fp16 base: without bringing it to unit size first it would be 0."""
    model, layer = one_layer(16, 12, True, torch.float16, norm_gradient="full")
    randomize(model)
    A, B = layer.lora_A.half(), layer.lora_B.half()
    from doratune.math.norm import full_gradient_output

    c = torch.full((16,), 1e-9)
    none = torch.zeros(0, dtype=torch.long)
    small = full_gradient_output(layer.adapted, A, B, layer.scaling, c, none)
    large = full_gradient_output(layer.adapted, A, B, layer.scaling, c * 1e9, none)
    for a, b in zip(small, large):
        torch.testing.assert_close(a * 1e9, b, rtol=2e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("axis", AXES)
def test_square_layers_keep_their_axis(axis):
    model, layer = one_layer(12, 12, rank=3, magnitude_axis=axis)
    randomize(model)
    W, _, A, B, m, s = (t.detach().clone().double() if torch.is_tensor(t) else t for t in tensors(layer))
    doratune.merge(model)
    torch.testing.assert_close(layer.weight.double(), reference.merged(W, A, B, m, s, axis), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", AXES)
def test_norm_is_exact(axis):
    model, layer = one_layer(64, 48, dtype=torch.bfloat16, rank=7, magnitude_axis=axis)
    randomize(model, scale=0.02)
    A, B = layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    n = layer.adapted.n(torch.bfloat16)
    exact = reference.norm(layer.weight, A, B, layer.scaling, axis)
    assert n.dtype == torch.float32
    assert ((n.double() - exact).abs() / exact).max() < 1e-4  # U is rounded to bf16, the norm is not


@pytest.mark.parametrize(("axis", "mode", "bias"), itertools.product(AXES, MODES, (True, False)))
def test_gradcheck(axis, mode, bias):
    """The hand-written backward is the derivative of the forward, float64. Detached: of the forward with n held constant,
    which finite differences cannot do, so it is compared with the reference at float64 precision instead."""
    model, layer = one_layer(6, 5, bias, torch.float64, rank=2, magnitude_axis=axis, norm_gradient=mode)
    randomize(model)
    x, dY = torch.randn(4, 5).double(), torch.randn(4, 6).double()
    if mode == "full":
        leaves = (x.requires_grad_(), layer.lora_A, layer.lora_B, layer.magnitude)
        names = ("lora_A", "lora_B", "magnitude")
        call = lambda x, *ps: torch.func.functional_call(layer, dict(zip(names, ps)), (x,))  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves)
    W, b, A, B, m, s = tensors(layer)
    exact_y, exact = reference.gradients(x, dY, W, b, A, B, m, s, axis, mode == "full")
    y, grads = run(layer, x, dY)
    torch.testing.assert_close(y, exact_y, rtol=1e-12, atol=1e-12)
    for name in exact:
        torch.testing.assert_close(grads[name], exact[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("axis", "dtype"), itertools.product(AXES, (torch.float32, torch.bfloat16, torch.float16)))
def test_merge_is_the_forward(axis, dtype):
    model, layer = one_layer(37, 29, True, dtype, rank=5, magnitude_axis=axis)
    randomize(model, scale=0.1)
    W, bias, A, B, m, s = (t.detach().clone() if torch.is_tensor(t) else t for t in tensors(layer))
    exact = reference.merged(W.double(), A.double(), B.double(), m.double(), s, axis)
    dense = reference.merged(W, A.to(dtype), B.to(dtype), m.to(dtype), s, axis)
    doratune.merge(model)
    assert type(layer) is torch.nn.Linear
    assert error(layer.weight, exact) <= FACTOR * max(error(dense, exact), torch.finfo(dtype).eps * exact.norm().item())


def test_shapes_and_layouts():
    """Non-contiguous, empty, one- and four-dimensional input."""
    model, layer = one_layer(7, 5, rank=2)
    randomize(model)
    W, bias, A, B, m, s = tensors(layer)
    for x in (torch.randn(5), torch.randn(5, 9).T, torch.randn(2, 3, 4, 5), torch.randn(0, 5), torch.randn(2, 0, 5)):
        y, grads = run(layer, x, torch.ones(*x.shape[:-1], 7))
        exact = reference.forward(x.double(), W.double(), bias.double(), A.double(), B.double(), m.double(), s)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        assert grads["x"].shape == x.shape


def test_magnitude_only_and_lora():
    x, dY = torch.randn(9, 10), torch.randn(9, 13)
    for axis in AXES:
        model, _ = one_layer(13, 10, targets=(), magnitude_only=["layer"], magnitude_axis=axis)
        randomize(model)
        check_close_to_reference(model.layer, x, dY, axis, False, torch.float32)
    model, layer = one_layer(13, 10, method="lora")
    randomize(model)
    assert layer.magnitude is None
    check_close_to_reference(layer, x, dY, "output", False, torch.float32)


def test_transformers_conv1d():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("layer", Conv1D(13, 10))
    torch.nn.init.normal_(model.layer.weight, std=0.3)
    for axis in AXES:
        doratune.attach(model, doratune.AdapterConfig(rank=3, targets=["layer"], magnitude_axis=axis))
        randomize(model)
        layer, x = model.layer, torch.randn(4, 10)
        args = [t.double() for t in (x, layer.weight.T, layer.bias, layer.lora_A, layer.lora_B, layer.magnitude)]
        exact = reference.forward(*args, layer.scaling, axis)
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
        before = layer.weight.clone()
        doratune.merge(model)
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
        doratune.unmerge(model)
        assert torch.equal(layer.weight, before)
        doratune.detach(model)
