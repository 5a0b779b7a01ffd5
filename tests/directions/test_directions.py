"""Directions and starts: VeRA's shared factors and kept products, PiSSA, OLoRA, LoftQ, relative magnitudes, LoRA+."""

import copy
import pickle

import grid
import pytest
import torch
from conftest import one_layer, tiny_llama
from torch import nn

import doratune
from doratune import AdapterConfig
from doratune.bases.dense import DenseBase
from doratune.errors import UserError


def test_veras_factors_are_one_pair_for_all_layers():
    model = doratune.attach(tiny_llama(), AdapterConfig(method="dvora", rank=64))
    shared = {id(layer.adapted.direction.shared) for _, layer in doratune.adapters(model)}
    assert len(shared) == 1
    assert not any("shared" in key or "vera_A" in key for key in model.state_dict())
    layer = model.model.layers[0].mlp.down_proj
    A, B = layer.adapted.low_rank()
    assert A.untyped_storage().data_ptr() == layer.adapted.direction.shared.get(A.device, A.dtype)[0].untyped_storage().data_ptr()
    assert not A.requires_grad and B.requires_grad
    dora = doratune.attach(tiny_llama(), AdapterConfig(rank=16))
    count = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, dora)]
    assert count[0] < count[1] / 5  # of a model whose layers are 32 wide; see test_inspect for 7B


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["vera", "dvora"])
def test_calls_share_veras_A_whatever_its_dtype(method, dtype):
    """224 layers of LLaMA-7B at rank 1,024 would hold 2.3 GiB of copies."""
    model = doratune.attach(tiny_llama().to(dtype), AdapterConfig(method=method, rank=64))
    model(torch.arange(8)[None]).logits.sum().backward()
    prepared = [layer.adapted.factors.A_RI for _, layer in doratune.adapters(model)]
    assert {A.dtype for A in prepared} == {dtype}
    assert len(prepared) > 4 and len({A.untyped_storage().data_ptr() for A in prepared}) == 1


def test_veras_copies_compute_the_same():
    model, layer = one_layer(13, 10, method="dvora", rank=6)
    grid.move(layer)
    x = torch.randn(4, 10)
    y = layer(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    model.bfloat16().float()
    assert layer.vera_b.dtype == torch.float32 and layer(x).dtype == torch.float32


@pytest.mark.parametrize("memory", [0, 10**6])
def test_a_kept_product_is_made_once(memory, monkeypatch):
    model, layer = one_layer(100, 90, method="dvora", rank=6, norm_memory=memory)
    grid.move(layer)
    products = []
    plain = DenseBase.forward_rows
    monkeypatch.setattr(DenseBase, "forward_rows", lambda *args: products.append(1) or plain(*args))
    optimizer = torch.optim.SGD(doratune.parameter_groups(model, lr=0.1))
    for _ in range(4):
        layer(torch.randn(4, 90)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(products) == (1 if memory else 4)
    x = torch.randn(4, 90)
    y = layer(x)
    doratune.refresh(model)
    torch.testing.assert_close(layer(x), y, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        layer.weight.mul_(1.5)  # another W: what was kept of it does not count
    A, B = layer.adapted.low_rank()
    expected = torch.linalg.vector_norm(layer.weight + B @ A, dim=1)
    torch.testing.assert_close(layer.adapted.n(torch.float32), expected)


def test_the_memory_is_for_all_layers_together():
    model = tiny_llama()
    one = 32 * 8 * 4 + 8 * 8 * 4  # q_proj: U and A·Aᵀ
    doratune.attach(model, AdapterConfig(method="dvora", rank=8, targets=["q_proj"], norm_memory=one + 10))
    assert [layer.adapted.keep_product for _, layer in doratune.adapters(model)] == [True, False]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_pissa_starts_at_the_leading_triples(method):
    model, layer = one_layer(40, 30, method=method, rank=5, alpha=10, start="pissa")
    U, S, Vh = torch.linalg.svd(layer.weight.detach())
    torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, U[:, :5] * S[:5] @ Vh[:5], rtol=1e-2, atol=2e-3)
    assert not layer.start_A.requires_grad
    x = torch.randn(6, 30)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_olora_starts_at_the_leading_columns():
    _, layer = one_layer(20, 30, rank=4, alpha=6, start="olora")
    Q, R = torch.linalg.qr(layer.weight.detach())
    torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, Q[:, :4] @ R[:4], rtol=1e-4, atol=1e-5)


def rounded_pair(seed=0):
    """(a model with coarse weights, the model that they were rounded from)."""
    torch.manual_seed(seed)
    original = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    coarse = copy.deepcopy(original)
    with torch.no_grad():
        for layer in coarse:
            layer.weight.copy_((layer.weight * 12).round() / 12)
    return coarse, original


def test_loftq_starts_nearer_to_the_original():
    coarse, original = rounded_pair()
    x = torch.randn(50, 40)
    before = (coarse(x) - original(x)).norm()
    doratune.attach(coarse, AdapterConfig(rank=8, start="loftq", targets=["0", "1"]), original=original)
    assert (coarse(x) - original(x)).norm() < 0.75 * before
    for layer in coarse:  # g = 1 although B is not 0
        V = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(layer.magnitude, torch.linalg.vector_norm(V, dim=1))
        U, S, Vh = torch.linalg.svd((original[0 if layer is coarse[0] else 1].weight - layer.weight).detach())
        best = S[8:].norm()
        assert (original[0 if layer is coarse[0] else 1].weight - V).norm() < 1.05 * best


def test_a_magnitude_from_the_original_weight_is_recorded_and_its_offset_said(tmp_path):
    coarse, original = rounded_pair()
    doratune.attach(coarse, AdapterConfig(rank=4, magnitude_from="original", targets=["0", "1"]), original=original)
    torch.testing.assert_close(coarse[0].magnitude, torch.linalg.vector_norm(original[0].weight, dim=1))
    report = doratune.verify(coarse, example=(torch.randn(3, 40),))
    assert report.ok and "|m/n - 1|" in str(report)
    doratune.save(coarse, tmp_path)
    y = coarse(torch.ones(1, 40))
    doratune.detach(coarse)
    doratune.load(coarse, tmp_path)
    assert torch.equal(coarse(torch.ones(1, 40)), y)
    assert "magnitude_from" in (tmp_path / "doratune.json").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "loftq"}, "needs the unquantized weights"),
        ({"magnitude_from": "original"}, "needs the unquantized weights"),
        ({"method": "vera", "start": "pissa"}, "which is for method lora or dora"),
        ({"method": "lora", "magnitude_form": "relative"}, "needs a method with a magnitude; set method: dora"),
        ({"method": "vera", "magnitude_from": "original"}, "set method: dvora"),
        ({"method": "vera", "rank_overrides": {"0": 2}}, "shares its factors"),
        ({"norm_memory": -1}, "norm_memory is -1"),
        ({"start": "svd"}, "start is 'svd'"),
        ({"method": "dorra"}, "did you mean 'dora'"),
        ({"method": "lokr", "rank": 9}, "rank 9 is larger"),
    ],
)
def test_what_is_not_defined_is_one_line_and_changes_nothing(settings, message):
    coarse, _ = rounded_pair()
    keys = set(coarse.state_dict())
    with pytest.raises(UserError, match=message) as caught:
        doratune.attach(coarse, AdapterConfig(**{"rank": 4, "targets": ["0", "1"]} | settings))
    assert "\n" not in str(caught.value)
    assert set(coarse.state_dict()) == keys and not list(doratune.adapters(coarse))


def test_relative_magnitudes_are_the_same_layer(tmp_path):
    model, layer = one_layer(13, 10, magnitude_form="relative")
    x = torch.randn(5, 10)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "layer.lora_A", "layer.lora_B", "layer.magnitude_delta",
    }  # fmt: skip
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.magnitude_delta.normal_(std=0.3)
    direct, other = one_layer(13, 10)
    with torch.no_grad():
        other.lora_B.copy_(layer.lora_B)
        other.lora_A.copy_(layer.lora_A)
        other.magnitude.copy_(layer.magnitude)
    torch.testing.assert_close(layer(x), other(x))
    dY = torch.randn(5, 13)
    layer(x).backward(dY)
    other(x).backward(dY)
    torch.testing.assert_close(layer.magnitude_delta.grad, other.magnitude.grad * other.magnitude.detach())
    doratune.save(model, tmp_path)
    doratune.save(direct, tmp_path / "direct")
    again, _ = one_layer(13, 10)
    doratune.detach(again)
    y = layer(x)
    torch.testing.assert_close(doratune.load(again, tmp_path).layer(x), y)
    doratune.merge(model)
    torch.testing.assert_close(layer(x), y)
    doratune.unmerge(model)
    assert torch.equal(layer(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)


def test_decay_pulls_a_relative_magnitude_to_its_start():
    model, layer = one_layer(13, 10, magnitude_form="relative")
    start = layer.magnitude.detach().clone()
    with torch.no_grad():
        layer.magnitude_delta.fill_(0.5)
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=0.1, magnitude_decay=0.9))
    for _ in range(60):
        for p in layer.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    torch.testing.assert_close(layer.magnitude, start, rtol=1e-2, atol=0)
    plain, _ = one_layer(13, 10)
    with pytest.raises(UserError, match="needs magnitude_form='relative'"):
        doratune.parameter_groups(plain, magnitude_decay=0.1)


@pytest.mark.parametrize(("method", "output", "inner"), [
    ("dora", ["lora_B"], ["lora_A"]),
    ("dvora", ["vera_b"], ["vera_d"]),
    ("dloha", ["hada_w2_a"], ["hada_w1_a", "hada_w1_b", "hada_w2_b"]),
    ("dlokr", ["lokr_w2_b"], ["lokr_w1", "lokr_w2_a"]),
])  # fmt: skip
def test_lora_plus_is_for_the_output_factor_and_never_for_m(method, output, inner):
    model, layer = one_layer(12, 10, method=method, rank=3)
    groups = {g["name"]: g for g in doratune.parameter_groups(model, 1e-3, 0.1, 2.0, output_factor_lr_ratio=16)}
    assert groups["output_factors"]["lr"] == 16e-3 and groups["factors"]["lr"] == 1e-3
    assert [id(p) for p in groups["output_factors"]["params"]] == [id(getattr(layer, name)) for name in output]
    assert [id(p) for p in groups["factors"]["params"]] == [id(getattr(layer, name)) for name in inner]
    assert groups["magnitude"]["lr"] == 2e-3 and groups["magnitude"]["weight_decay"] == 0


def test_one_norm_a_step_for_directions_that_make_their_factors():
    for method in ("dvora", "dloha", "dlokr"):
        model, layer = one_layer(12, 10, method=method, rank=3)
        optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=0.01))
        for step in range(3):
            for _ in range(2):  # accumulation
                layer(torch.randn(70, 10)).square().sum().backward()
            assert layer.adapted.preparations == step + 1
            optimizer.step()
            optimizer.zero_grad()
