"""Every supported cell of the grid against the dense float64 definition; every other one is a refusal with a reason."""

from pathlib import Path

import expectations
import grid
import pytest
import torch
from refusals import REFUSALS, message

import doratune
from doratune.layers.adapted import Adapted

SUPPORTED = [key for key in grid.cells() if grid.outcome(*key) is None]


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    scale = b.norm()
    return float((a - b).norm() / scale) if scale else float(a.norm())


@pytest.mark.parametrize(("kind", "method", "axis"), SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_exact(kind, method, axis, dtype):
    case, W = grid.cell(kind, method, axis, dtype)
    model, layer = case.model, case.layer
    with_adapter = layer(case.x)
    doratune.detach(model)
    assert torch.equal(with_adapter, layer(case.x))
    assert torch.equal(case.to_matrix(layer.weight).double(), W)


@pytest.mark.parametrize(("kind", "method", "axis"), SUPPORTED)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_gradients_and_merge(kind, method, axis, full, dtype):
    case, W = grid.cell(kind, method, axis, dtype, full)
    layer = case.layer
    own, s = grid.move(layer), layer.scaling
    x = case.x.clone().requires_grad_() if case.x.is_floating_point() else case.x
    y = layer(x)
    dY = torch.randn(y.shape).to(y.dtype)
    y.backward(dY)
    got = {name: p.grad for name, p in own.items()} | ({"x": x.grad} if x.is_floating_point() else {})
    exact_y, exact = grid.dense(case, W, own, s, axis, full, torch.float64, dY)
    peer_y, peer = grid.dense(case, W, own, s, axis, full, dtype, dY)
    floor = 2e-5 if dtype == torch.float32 else 2e-2
    assert y.dtype == dtype
    assert relative(y, exact_y) <= max(floor / 4, 3 * relative(peer_y, exact_y))
    for name, gradient in exact.items():
        assert relative(got[name], gradient) <= max(floor, 3 * relative(peer[name], gradient)), name
    with torch.no_grad():
        assert relative(layer(case.x), exact_y) <= max(floor / 4, 3 * relative(peer_y, exact_y))
        doratune.merge(case.model)
        assert not isinstance(layer, Adapted) and not hasattr(layer, "adapted")
        assert relative(layer(case.x), exact_y) <= max(floor, 3 * relative(peer_y, exact_y))
        doratune.unmerge(case.model)
        assert torch.equal(case.to_matrix(layer.weight).double(), W)
        assert relative(layer(case.x), y) <= floor / 4


@pytest.mark.parametrize(("kind", "method", "axis"), [key for key in SUPPORTED if key[1] in ("dora", "dvora", "magnitude only")])
def test_zero_rows_stay_plain(kind, method, axis):
    """g = 1 and dm = 0 on rows (columns) of zeros, whatever m is."""
    torch.manual_seed(0)
    case = grid.KINDS[kind]()
    with torch.no_grad():
        W = case.to_matrix(case.layer.weight)
        W[5] = 0.0 if axis == "output" else W[5]
        if axis == "input":
            W[:, 2] = 0.0
        if W.data_ptr() != case.layer.weight.data_ptr():
            case.layer.weight.copy_(W.view(case.layer.weight.shape))
    if "Embedding" in kind:
        case.x[0, :2] = 5
        with torch.no_grad():
            case.layer.weight[0] = case.layer.weight[1]  # the padding row
    doratune.attach(case.model, grid.config(method, axis))
    own = grid.move(case.layer)
    y = case.layer(case.x)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in own.values())
    row = 5 if axis == "output" else 2
    assert own["magnitude"].grad[row] == 0
    before = y.detach().clone()
    with torch.no_grad():
        own["magnitude"][row] = 7.0
        assert torch.equal(case.layer(case.x), before)
    assert case.layer.adapted.facts.directionless.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize(("kind", "method", "axis"), SUPPORTED)
def test_saved_and_loaded(kind, method, axis, tmp_path):
    case, _ = grid.cell(kind, method, axis)
    grid.move(case.layer)
    y = case.layer(case.x)
    doratune.save(case.model, tmp_path / "adapter")
    doratune.detach(case.model)
    doratune.load(case.model, tmp_path / "adapter")
    assert relative(case.layer(case.x), y) <= (1e-6 if "start" in method else 1e-7)


def test_the_page_says_what_the_code_does():
    for package in ("bitsandbytes", "torchao.quantization", "hqq.core.quantize"):
        pytest.importorskip(package)
    assert (Path(__file__).parents[2] / "docs" / "support.md").read_text(encoding="utf-8") == grid.page()


def test_each_expectation_names_a_test_that_is_there():
    tests = Path(__file__).parents[1]
    for behaviour, _, _, where in expectations.BEHAVIOURS:
        path, _, name = where.partition("::")
        assert f"def {name}" in (tests / path).read_text(encoding="utf-8"), behaviour


@pytest.mark.parametrize(("kind", "situation", "call"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_refused_says_why_in_one_line(kind, situation, call):
    said = message(call)
    assert said, f"{situation}: not refused"
    assert "FOLDER" not in situation and "Traceback" not in said
