"""One adapted layer: exact start, precision, dropout, autocast, states, long training with zero rows."""

import copy

import pytest
import torch
from conftest import one_layer, randomize, tiny_gpt2, tiny_llama
from torch import nn

import doratune
from doratune.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_start_is_the_base_bit_for_bit(dtype, bias, axis):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 47, bias=bias), nn.Linear(47, 21, bias=bias)).to(dtype)
    with torch.no_grad():
        model[0].weight[5] = 0
    x = torch.randn(19, 33).to(dtype)
    base = model(x)
    doratune.attach(model, doratune.AdapterConfig(rank=4, magnitude_axis=axis, targets=["0", "1"]))
    assert torch.equal(model(x), base)
    assert doratune.verify(model, example=(x,)).ok


def test_start_is_exact_after_a_dtype_change():
    model, layer = one_layer(33, 20)
    model.to(torch.bfloat16)
    x = torch.randn(9, 20).bfloat16()
    assert torch.equal(model(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert {p.dtype for p in (layer.lora_A, layer.lora_B, layer.magnitude)} == {torch.float32}
    with torch.no_grad():
        layer.magnitude[3] *= 1.25  # a trained magnitude stays
    trained = layer.magnitude[3].item()
    model.half()
    assert layer.magnitude[3].item() == trained
    assert layer.magnitude.dtype == torch.float32


def test_whole_models_start_exactly():
    for build in (tiny_llama, tiny_gpt2):
        model = build()
        ids = torch.randint(3, 300, (2, 17))
        base = model(input_ids=ids).logits
        doratune.attach(model)
        assert torch.equal(model(input_ids=ids).logits, base)
        doratune.detach(model)
        assert torch.equal(model(input_ids=ids).logits, base)
        assert not any("lora" in key or "magnitude" in key for key in model.state_dict())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_base_dtype(weights):
    model, layer = one_layer(16, 12, dtype=weights)
    randomize(model)
    x = torch.randn(5, 12).to(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.functional.linear(x, layer.weight).dtype
        y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    exact = copy.deepcopy(model).float()(x.float())
    assert (y.float() - exact).norm() / exact.norm() < 2e-2


def test_dropout_is_on_the_low_rank_input_only():
    model, layer = one_layer(200, 50, bias=False, dropout=0.5)
    x = torch.randn(7, 50)
    model.train()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))  # B = 0: dropout changes nothing
    randomize(model)
    assert not torch.equal(layer(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    model.eval()
    assert torch.equal(layer(x), layer(x))
    assert (mean - layer(x)).norm() / layer(x).norm() < 0.05


def test_small_gain_keeps_its_precision():
    """g = 0.002: (g − 1) rounded to bf16 would be 65 times the floor."""
    model, layer = one_layer(64, 64, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.magnitude.mul_(0.002)
    x = torch.randn(50, 64).bfloat16()
    exact = 0.002 * (x.double() @ layer.weight.double().T)
    assert (layer(x).double() - exact).norm() / exact.norm() < 2 * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_tiny_rows_learn_and_stay_finite(dtype):
    """300 AdamW steps: rows of norm 0, 1e-30, 1e-7 and 1e3 move as a LoRA row does, nothing becomes NaN."""
    torch.manual_seed(0)
    rows = {2: 0.0, 5: 1e-30, 9: 1e-7}
    weight = torch.randn(24, 16)
    weight[11] *= 1e3
    for row, size in rows.items():
        weight[row] = size
    moved = {}
    x, target = torch.randn(64, 16).to(dtype), torch.randn(64, 24)
    for method in ("dora", "lora"):
        model = nn.Sequential(nn.Linear(16, 24, bias=False)).to(dtype)
        with torch.no_grad():
            model[0].weight.copy_(weight)
        doratune.attach(model, doratune.AdapterConfig(method=method, rank=4, targets=["0"]))
        optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
        start = model(x).detach().float()
        for _ in range(300):
            nn.functional.mse_loss(model(x).float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        moved[method] = (model(x).detach().float() - start).norm(dim=0)[list(rows)]
    assert (moved["lora"] > 0.1).all()
    assert (moved["dora"] / moved["lora"] > 0.3).all()


def test_merge_and_unmerge_a_thousand_times():
    model, layer = one_layer(33, 29, dtype=torch.bfloat16)
    randomize(model)
    x = torch.randn(4, 29).bfloat16()
    before, y = layer.weight.clone(), model(x)
    assert doratune.merge(model) == layer.weight.nbytes
    merged = layer.weight.clone()
    assert not torch.equal(merged, before)
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    doratune.unmerge(model)
    for _ in range(1000):
        doratune.merge(model)
        assert torch.equal(layer.weight, merged)
        doratune.unmerge(model)
    assert torch.equal(layer.weight, before)
    assert torch.equal(model(x), y)


def test_states_refuse_what_makes_no_sense():
    model, layer = one_layer()
    with pytest.raises(UserError, match="attached already"):
        doratune.attach(model)
    doratune.merge(model, keep="none")
    for call, text in (
        (lambda: doratune.merge(model), "merged already"),
        (lambda: doratune.parameter_groups(model), "merged for good"),
        (lambda: doratune.unmerge(model), "no original weight"),
    ):
        with pytest.raises(UserError, match=text):
            call()
    kept, _ = one_layer()
    doratune.merge(kept)
    for call in (doratune.parameter_groups, doratune.detach, doratune.attach):
        with pytest.raises(UserError, match=r"call doratune\.unmerge"):
            call(kept)
    plain = nn.Linear(3, 3)
    with pytest.raises(UserError, match="no adapter is attached"):
        doratune.merge(plain)
    with pytest.raises(UserError, match="keep is 'disk'"):
        doratune.merge(one_layer()[0], keep="disk")


def test_merge_refuses_nan_before_it_changes_anything():
    model, layer = one_layer()
    before = layer.weight.clone()
    with torch.no_grad():
        layer.lora_B[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        doratune.merge(model)
    assert torch.equal(layer.weight, before)
    assert layer.lora_A is not None


def test_double_backward_raises():
    model, layer = one_layer()
    randomize(model)
    x = torch.randn(2, 10, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


def test_parameter_groups():
    model, layer = one_layer(also_train=())
    groups = {g["name"]: g for g in doratune.parameter_groups(model, 1e-3, 0.1, magnitude_lr_ratio=2.0)}
    assert groups["magnitude"]["params"] == [layer.magnitude]
    assert groups["magnitude"]["weight_decay"] == 0.0
    assert groups["magnitude"]["lr"] == 2e-3
    assert [id(p) for p in groups["factors"]["params"]] == [id(layer.lora_A), id(layer.lora_B)]
    assert groups["factors"]["weight_decay"] == 0.1
    doratune.detach(model)
    doratune.attach(model, doratune.AdapterConfig(rank=2), trainable=False)
    with pytest.raises(UserError, match="nothing is trainable"):
        doratune.parameter_groups(model)


def test_seed_and_order_do_not_matter_for_the_start():
    one, two = tiny_llama(), tiny_llama()
    doratune.attach(one, doratune.AdapterConfig(rank=2, targets=["q_proj", "v_proj"], seed=3))
    torch.manual_seed(99)
    doratune.attach(two, doratune.AdapterConfig(rank=2, targets=["v_proj", "k_proj", "q_proj"], seed=3))
    path = "model.layers.1.self_attn.v_proj"
    assert torch.equal(one.get_submodule(path).lora_A, two.get_submodule(path).lora_A)
    assert one.get_submodule(path).lora_A.abs().max() <= 32**-0.5


def test_layer_keeps_its_face():
    """Models read `.weight.dtype`, `.in_features`, isinstance; the repr says what is attached."""
    model, layer = one_layer(rank=3)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (10, 13)
    assert set(model.state_dict()) == {f"layer.{k}" for k in ("weight", "bias", "lora_A", "lora_B", "magnitude")}
    assert "rank=3" in repr(model)
    assert layer.scaling == 5.0 / 3
    assert [name for name, _ in doratune.adapters(model)] == ["layer"]


def test_compiled_model_gives_the_same():
    """Until the op is visible to torch.compile, the adapted layer breaks the graph; it must still be right."""
    model, _ = one_layer()
    randomize(model)
    x = torch.randn(70, 10)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        model.layer.lora_B.mul_(2)
    torch.testing.assert_close(compiled(x), model(x))


def test_ddp_of_two_processes(tmp_path):
    """Real processes over gloo: gradients are averaged, the norm is right on both."""
    import torch.multiprocessing as mp

    mp.spawn(_ddp_worker, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)


def _ddp_worker(rank, store, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, _ = one_layer()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=0.05))
    torch.manual_seed(rank)
    for _ in range(3):
        wrapped(torch.randn(6, 10)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("shape", [(4, 10), (2, 3, 10)])
def test_in_place_operations_after_the_layer(method, shape):
    model, layer = one_layer(method=method)
    randomize(model)
    x = torch.randn(shape)
    grads = []
    for in_place in (True, False):
        model.zero_grad()
        y = layer(x)
        y = y.add_(1.0).mul_(2.0) if in_place else (y + 1.0) * 2.0
        y = torch.relu_(y) if in_place else torch.relu(y)
        y.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name in grads[0]:  # m's gradient comes from y, or from the base's output once y was changed
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_a_trainable_bias_is_never_scaled(axis):
    model, layer = one_layer(magnitude_axis=axis)
    randomize(model)
    layer.bias.requires_grad_(True)
    layer(torch.randn(7, 10)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((13,), 7.0))


def test_accelerate_hooks_run_the_adapter():
    """accelerate keeps the old forward on the instance; the class alone would be a silent no-op."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = nn.Sequential(nn.Linear(10, 13))
    add_hook_to_module(model[0], ModelHook())
    x = torch.randn(3, 10)
    base = model(x)
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["0"]))
    randomize(model)
    y = model(x)
    assert not torch.equal(y, base)
    doratune.merge(model)
    torch.testing.assert_close(model(x), y)
    doratune.unmerge(model)
    assert torch.equal(model(x), y)
    remove_hook_from_module(model[0])
    assert torch.equal(model(x), y)
    doratune.detach(model)
    assert torch.equal(model(x), base)


def test_subclasses_that_compute_something_else_are_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight * 2, self.bias)

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), self.bias

    class Same(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    class Scaled(nn.Linear):
        scaling = 3.0

    for cls, message in ((Doubled, "is not x·Wᵀ"), (Pair, "is not x·Wᵀ"), (Scaled, "attribute 'scaling' of its own")):
        with pytest.raises(UserError, match=message):
            doratune.attach(nn.Sequential(cls(4, 4)), doratune.AdapterConfig(targets=["0"]))
    model = nn.Sequential(Same(4, 4))
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["0"]))
    model[0].forward = lambda x: x
    doratune.detach(model)
    with pytest.raises(UserError, match="replaced on the instance"):
        doratune.attach(model, doratune.AdapterConfig(targets=["0"]))


def test_nested_attach_is_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    doratune.attach(model[0], doratune.AdapterConfig(rank=2, targets=["0"]))
    with pytest.raises(UserError, match="has an adapter already"):
        doratune.attach(model, doratune.AdapterConfig(rank=2))
    doratune.detach(model[0])
    doratune.attach(model, doratune.AdapterConfig(rank=2))
    with pytest.raises(UserError, match="has an adapter already"):
        doratune.attach(model[0])


def test_unmerge_after_a_move_or_a_dtype_change():
    model, layer = one_layer(33, 29)
    doratune.merge(model)
    model.bfloat16()
    doratune.unmerge(model)
    x = torch.randn(5, 29).bfloat16()
    assert torch.equal(model(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.magnitude.dtype == torch.float32
    assert isinstance(layer.lora_A, nn.Parameter)


def test_merge_that_overflows_or_fails_changes_nothing(monkeypatch):
    model, layer = one_layer(dtype=torch.float16)
    before = layer.weight.clone()
    with torch.no_grad():
        layer.magnitude.mul_(1e6)
    with pytest.raises(UserError, match="overflows float16"):
        doratune.merge(model)
    assert torch.equal(layer.weight, before)

    pair = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    doratune.attach(pair, doratune.AdapterConfig(rank=2, targets=["0", "1"]))
    randomize(pair)
    x = torch.randn(3, 6)
    y, weights = pair(x), [m.weight.clone() for m in pair]
    real = doratune.adapter.merge.merged_tiles

    def fails_on_the_second(weight, n):
        if weight is pair[1].adapted:
            raise MemoryError
        return real(weight, n)

    monkeypatch.setattr("doratune.adapter.merge.merged_tiles", fails_on_the_second)
    with pytest.raises(MemoryError):
        doratune.merge(pair)
    monkeypatch.undo()
    assert all(torch.equal(m.weight, w) for m, w in zip(pair, weights))
    assert torch.equal(pair(x), y)


def test_merge_ignores_autocast_and_keeps_on_the_device():
    model, layer = one_layer(33, 29)
    randomize(model)
    doratune.merge(model)
    expected = layer.weight.clone()
    doratune.unmerge(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        doratune.merge(model, keep="device")
    assert torch.equal(layer.weight, expected)
    doratune.unmerge(model)
    assert not torch.equal(layer.weight, expected)


def test_double_to_bfloat16_keeps_fp32():
    model, layer = one_layer(dtype=torch.float64)
    assert layer.magnitude.dtype == torch.float64
    model.bfloat16()
    assert {p.dtype for p in (layer.lora_A, layer.lora_B, layer.magnitude)} == {torch.float32}


def test_verify_leaves_the_modes_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["0"]))
    model.train()
    model[1].eval()
    doratune.verify(model, example=torch.randn(3, 4))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    with pytest.raises(RuntimeError):
        doratune.verify(model, example=torch.randn(3, 5))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_keyword_input_and_lazy_modules():
    model, layer = one_layer()
    x = torch.randn(2, 10)
    assert torch.equal(layer(input=x), layer(x))
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    with pytest.raises(UserError, match="run the model once"):
        doratune.attach(lazy, doratune.AdapterConfig(rank=2))
    lazy(torch.randn(2, 5))
    doratune.attach(lazy, doratune.AdapterConfig(rank=2))


def test_small_rows_between_tiny_and_ordinary_train():
    """1e-4 of the median is a direction like any other."""
    model, layer = one_layer()
    doratune.detach(model)
    with torch.no_grad():
        model.layer.weight[4] *= 1e-4
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["layer"]))
    layer(torch.randn(5, 10)).square().sum().backward()
    assert layer.magnitude.grad[4] != 0


def test_modules_of_one_shape_start_differently():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["0", "1"]))
    assert not torch.equal(model[0].lora_A, model[1].lora_A)


def replicated(module):
    """As torch.nn.parallel.replicate makes one device's copy: tensors are plain attributes, and depend on the originals."""
    copied = {one: one._replicate_for_data_parallel() for one in module.modules()}
    for one, replica in copied.items():
        for name, child in one._modules.items():
            setattr(replica, name, copied[child])
        for name, p in one._parameters.items():
            setattr(replica, name, None if p is None else p * 1)
    return copied[module]


@pytest.mark.parametrize("method", ["dora", "lora", "dvora"])
@pytest.mark.parametrize("bias", [True, False])
def test_replicas_of_data_parallel(method, bias):
    """Each copy computes with its own tensors, and the originals get the gradients; twice, as in two steps."""
    model, layer = one_layer(bias=bias, method=method)
    with torch.no_grad():
        for name, p in layer.named_parameters(recurse=False):
            if name in ("lora_B", "vera_b", "magnitude"):
                p.add_(0.1 * torch.randn(p.shape))
    for _ in range(2):
        x = torch.randn(20, 10)
        want = torch.autograd.grad(model(x).square().sum(), [p for p in model.parameters() if p.requires_grad])
        replicas = [replicated(model) for _ in range(2)]
        loss = sum(replica(part).square().sum() for replica, part in zip(replicas, x.chunk(2), strict=True))
        got = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            layer.magnitude.mul_(1.1) if layer.magnitude is not None else layer.lora_B.mul_(1.1)
