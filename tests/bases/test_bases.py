"""Quantized bases with the real quantizers: forward, gradients, merging and the exact start against the dequantized weight."""

import copy
import io

import grid
import pytest
import reference
import storages
import torch
from storages import BASES, NoGradient, Rounding, SignScale, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import doratune
from doratune.bases import base_of
from doratune.errors import UserError
from doratune.layers import kind_of

METHODS = ("lora", "dora", "dvora", "magnitude only")
CELLS = [(m, a) for m in METHODS for a in ("output", "input") if a == "output" or m != "lora"]
DTYPES = (torch.float32, torch.bfloat16)
NO_EVALUATION = ("nf4, odd rows", "nf4, a block and a half")
ROUNDS_INPUTS = ("torchao int8, dynamic",)
NO_WAY_BACK = ("registered", "GPTQ", "torchao int8, dynamic", *NO_EVALUATION)
AGAIN = [name for name in BASES if not name.startswith(NO_WAY_BACK)]

registry = storages._registry
pytestmark = [pytest.mark.usefixtures("registry")]


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def dense(stored, own, x, dY, axis, full, dtype):
    """(y, {name: gradient}) of the dense definition over the dequantized weight."""
    layer = stored.layer
    leaves = {name: p.detach().to(dtype).requires_grad_() for name, p in own.items()}
    x = x.detach().to(dtype).requires_grad_()
    change = grid.delta(layer, {name: leaf.double() for name, leaf in leaves.items()})
    change = None if change is None else change.to(dtype)
    eye = torch.eye(len(stored.W), dtype=dtype)
    A, B = (None, None) if change is None else (change, eye)
    W = reference.merged(stored.W.to(dtype), A, B, leaves.get("magnitude"), layer.scaling, axis, full)
    y = nn.functional.linear(x, W, layer.bias.detach().to(dtype))
    y.backward(dY.to(dtype))
    return y.detach(), {name: t.grad for name, t in leaves.items()} | {"x": x.grad}


def packed(module) -> list[torch.Tensor]:
    """The bytes of everything in a layer's state, also of what is not a number in its storage dtype."""
    found = [t for t in module.state_dict().values() if isinstance(t, torch.Tensor)]
    flat = [[getattr(t, n) for n in t.__tensor_flatten__()[0]] if hasattr(t, "__tensor_flatten__") else [t] for t in found]
    return [t.detach().clone().flatten().view(torch.uint8) for ts in flat for t in ts]


def attached(name, method="dora", axis="output", dtype=torch.bfloat16, full=False, **more):
    stored = build(name, dtype)
    doratune.attach(stored.model, grid.config(method, axis, full, **more))
    return stored


def inputs(stored, *shape):
    return torch.randn(*shape or (2, 7), stored.W.shape[1]).to(stored.dtype)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_tiles_are_the_dequantized_weight(name, dtype, monkeypatch):
    stored = build(name, dtype)
    for module in ("quantized", "opaque"):
        monkeypatch.setattr(f"doratune.bases.{module}.TILE_NUMBERS", 700)
    base = kind_of(stored.layer).base(stored.layer)
    assert base.trial(stored.layer) is None and base.shape(stored.layer) == tuple(stored.W.shape)
    tiles = list(base.row_tiles(stored.layer))
    assert len(tiles) > 1 or "columns" in name or "3 bit" in name
    assert torch.equal(torch.cat([tile for _, tile in tiles]), stored.W.float())
    index = torch.tensor([95, 3, 4, 40])
    some = torch.cat([tile for _, tile in base.row_tiles(stored.layer, index)])
    assert torch.equal(some, stored.W[index].float()) and some.dtype == torch.float32
    rows = torch.randn(3, len(stored.W))
    error = relative(base.backward_rows(stored.layer, rows), rows.double() @ stored.W.double())
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("method", "axis"), CELLS)
def test_start_is_exact(name, method, axis):
    stored = build(name)
    for train in (True, False) if name not in NO_EVALUATION else (True,):  # bitsandbytes cannot evaluate those on every CPU
        stored.model.train(train)
        x = inputs(stored)
        before = stored.model(x)
        doratune.attach(stored.model, grid.config(method, axis))
        assert torch.equal(stored.model(x), before)
        assert doratune.verify(stored.model, example=(x,)).ok
        with torch.no_grad():
            assert torch.equal(stored.model(x), before)
        doratune.detach(stored.model)
        if train:
            assert torch.equal(stored.model(x), before)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("method", "axis"), CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True])
def test_forward_gradients_and_merge(name, method, axis, dtype, full):
    stored = attached(name, method, axis, dtype, full)
    own, x = grid.move(stored.layer), inputs(stored)
    y = stored.model(x.requires_grad_())
    dY = torch.randn(y.shape).to(y.dtype)
    y.backward(dY)
    exact_y, exact = dense(stored, own, x, dY, axis, full, torch.float64)
    peer_y, peer = dense(stored, own, x, dY, axis, full, dtype)
    floor = 4e-2 if name in ROUNDS_INPUTS else 2e-2 if dtype == torch.bfloat16 else 2e-5
    assert y.dtype == dtype
    assert relative(y, exact_y) <= max(floor / 4, 3 * relative(peer_y, exact_y))
    got = {key: p.grad for key, p in own.items()} | {"x": x.grad}
    for key, gradient in exact.items():
        assert relative(got[key], gradient) <= max(floor, 3 * relative(peer[key], gradient)), key
    state, cls, x = packed(stored.layer), type(stored.layer).plain_class, x.detach()
    doratune.merge(stored.model)
    assert type(stored.layer) is nn.Linear and stored.layer.weight.dtype == dtype and not hasattr(stored.layer, "quant_state")
    assert relative(stored.model(x), exact_y) <= max(floor, 3 * relative(peer_y, exact_y))
    doratune.unmerge(stored.model)
    assert type(stored.layer).plain_class is cls
    assert len(state) == len(packed(stored.layer)) and all(map(torch.equal, packed(stored.layer), state))
    assert torch.equal(stored.model(x), y)


@pytest.mark.parametrize("name", [name for name in BASES if name not in NO_EVALUATION])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_norm_in_evaluation(name, axis):
    """The norm is W's, also where the forward in evaluation rounds its inputs: that one is not asked."""
    stored = attached(name, axis=axis, dtype=torch.float32)
    stored.model.eval()
    grid.move(stored.layer)
    A, B, s = stored.layer.lora_A, stored.layer.lora_B, stored.layer.scaling
    with torch.no_grad():
        n = stored.layer.adapted.n(torch.float32)
    assert relative(n, reference.norm(stored.W, A, B, s, axis)) < 1e-6


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.parametrize("keep", ["cpu", "device", "none"])
def test_quantized_again(name, keep):
    """Each number within half a step of the merged weight, in the storage that it was in; unmerge gives the first one back."""
    stored = attached(name)
    grid.move(stored.layer)
    x = inputs(stored)
    y, cls, version = stored.model(x), type(stored.layer).plain_class, stored.layer.adapted.base.version(stored.layer)
    want = stored.layer.adapted.kind.base(stored.layer)
    merged = copy.deepcopy(stored.model)
    doratune.merge(merged, keep)
    W = merged.layer.weight.detach().float()
    kept = doratune.merge(stored.model, keep, quantized="same")
    assert type(stored.layer) is cls and (kept == 0) == (keep == "none")
    now = torch.cat([tile for _, tile in want.row_tiles(stored.layer)])
    by_row = "int8" in name or "torchao" in name
    step = (W.abs().amax(1, keepdim=True) if by_row else W.abs().amax()) * stored.again
    assert ((now - W).abs() <= 1.1 * step).all()
    if keep == "none":
        with pytest.raises(UserError, match="no original weight was kept"):
            doratune.unmerge(stored.model)
    else:
        doratune.unmerge(stored.model)
        assert stored.layer.adapted.base.version(stored.layer) == version
        assert torch.equal(stored.model(x), y)


@pytest.mark.parametrize("name", [name for name in BASES if name not in AGAIN])
def test_storages_without_a_way_back(name):
    stored = attached(name)
    with pytest.raises(UserError, match='merge with quantized="dense"'):
        doratune.merge(stored.model, quantized="same")
    assert hasattr(stored.layer, "adapted")


@pytest.mark.parametrize("name", BASES)
def test_saved_loaded_copied_and_pickled(name, tmp_path):
    stored = attached(name)
    grid.move(stored.layer)
    x = inputs(stored)
    y = stored.model(x)
    copied = copy.deepcopy(stored.model)
    assert torch.equal(copied(x), y)
    doratune.save(stored.model, tmp_path / "adapter")
    doratune.detach(stored.model)
    doratune.load(stored.model, tmp_path / "adapter")
    assert torch.equal(stored.model(x), y)
    if not name.startswith("torchao"):  # whose tensors cannot be pickled in every release
        torch.save(copied, file := io.BytesIO())
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), y)


class Made(TorchDispatchMode):
    """Counts tensors with at least O·I numbers of 16 bits or more, as they are made."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.count, self.paused = numbers, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        given = {id(a) for a in args}
        for t in out if isinstance(out, tuple | list) else (out,):
            if type(t) is torch.Tensor and id(t) not in given and t.numel() >= self.numbers and t.dtype.itemsize > 1:
                self.count += t.is_floating_point() and not t._is_view() and not self.paused
        return out


@pytest.mark.parametrize("name", ["nf4", "nf4, double", "fp4", "bitsandbytes int8", "torchao float8", "registered, with rows"])
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("full", [False, True])
def test_no_dense_copy_beyond_the_layers_own(name, axis, full, monkeypatch):
    """A DoRA step makes as many tensors of W's size as a LoRA step over the same base, besides those in the layer's own forward."""
    for module in ("quantized", "opaque"):
        monkeypatch.setattr(f"doratune.bases.{module}.TILE_NUMBERS", 700)
    counts = {}
    for method in ("lora", "dora"):
        stored = attached(name, method, axis if method == "dora" else "output", full=full and method == "dora")
        grid.move(stored.layer)
        x, base = inputs(stored, 5).requires_grad_(), stored.layer.adapted.base
        made, own_forward = Made(stored.W.numel()), type(base).forward_rows

        def uncounted(module, rows, base=base, made=made, own_forward=own_forward):
            made.paused = True
            try:
                return own_forward(base, module, rows)
            finally:
                made.paused = False

        base.forward_rows = uncounted
        with made:
            stored.model(x).sum().backward()
        counts[method] = made.count
    assert counts["dora"] <= counts["lora"]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("axis", ["output", "input"])
def test_zero_rows_stay_plain(name, axis):
    original = storages._source

    def with_zeros(dtype, bias=True, columns=storages.COLUMNS):
        source = original(dtype, bias, columns)
        source.weight.data[5], source.weight.data[:, 2] = 0, 0
        return source

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storages, "_source", with_zeros)
        stored = build(name)
    zero = (stored.W == 0).all(1 if axis == "output" else 0)
    if not zero.any() or not torch.isfinite(stored.W).all():
        pytest.skip("this quantizer does not keep zeros")
    doratune.attach(stored.model, grid.config("dora", axis))
    own = grid.move(stored.layer)
    y = stored.model(x := inputs(stored))
    y.sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in own.values())
    assert (own["magnitude"].grad[zero] == 0).all()
    with torch.no_grad():
        own["magnitude"][zero] = 7.0
        assert torch.equal(stored.model(x), y)


def test_an_inexact_forward_is_found_out():
    storages._own(torch.float32)
    model = nn.Sequential(Rounding(storages._source(torch.float32)))
    doratune.attach(model, doratune.AdapterConfig(rank=3))
    assert not model[0].adapted.base.exact_forward
    model = nn.Sequential(SignScale(storages._source(torch.float32)))
    doratune.attach(model, doratune.AdapterConfig(rank=3))
    assert model[0].adapted.base.exact_forward and model[0].adapted.base.has_gradient
    model = nn.Sequential(NoGradient(storages._source(torch.float32)))
    doratune.attach(model, doratune.AdapterConfig(rank=3))
    assert not model[0].adapted.base.has_gradient


def test_layers_that_do_not_run_are_refused():
    class Broken(SignScale):
        def forward(self, x):
            raise NotImplementedError("no kernel for this device")

    storages._own(torch.float32)
    with pytest.raises(UserError, match=r"its forward fails on cpu \(NotImplementedError: no kernel for this device"):
        doratune.attach(nn.Sequential(Broken(storages._source(torch.float32))), doratune.AdapterConfig(rank=3, targets=["0"]))
    doratune.bases.register(
        lambda m: isinstance(m, SignScale), rows=lambda m, which: -m.codes[which] * m.step[which], name="of the tests"
    )
    with pytest.raises(UserError, match="its forward and its dequantized rows differ by 200 %"):
        doratune.attach(nn.Sequential(SignScale(storages._source(torch.float32))), doratune.AdapterConfig(rank=3, targets=["0"]))
    with pytest.raises(UserError, match="needs a function"):
        doratune.bases.register("SignScale")


def test_weights_that_are_not_quantized_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    for layer, why in (
        (bnb.nn.Linear4bit(64, 32), "not quantized yet"),
        (bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False), "not quantized yet"),
        (bnb.nn.Linear8bitLt(64, 32), "has_fp16_weights=False"),
    ):
        with pytest.raises(UserError, match=why):
            doratune.attach(nn.Sequential(layer), doratune.AdapterConfig(rank=3, targets=["0"]))


@pytest.mark.parametrize("axis", ["output", "input"])
def test_a_weight_repacked_for_cpu(axis):
    """bitsandbytes repacks a 4-bit weight in its first evaluation on some CPUs; its own layer then has no gradient."""
    stored = build("nf4, double")
    stored.model.eval()
    x = inputs(stored)
    before = stored.model(x)
    base = base_of(kind_of(stored.layer), stored.layer)
    if not getattr(base.state(stored.layer), "packing_format_for_cpu", False):
        pytest.skip("this CPU does not repack")
    stored.W, plain = torch.cat([tile for _, tile in base.row_tiles(stored.layer)]), stored.W
    assert relative(stored.W, plain) < 5e-3
    doratune.attach(stored.model, grid.config("dora", axis))
    assert torch.equal(stored.model(x), before)
    own, x = grid.move(stored.layer), x.float().to(stored.dtype).requires_grad_()
    y = stored.model(x)
    dY = torch.randn(y.shape).to(y.dtype)
    y.backward(dY)
    exact_y, exact = dense(stored, own, x, dY, axis, False, torch.float64)
    assert relative(y, exact_y) < 2e-2
    for key, gradient in exact.items():
        assert relative({**{k: p.grad for k, p in own.items()}, "x": x.grad}[key], gradient) < 3e-2, key


def test_a_repacked_weight_is_not_unpacked_by_attaching(tmp_path):
    """Whoever asks such a model for its state has its blocks' scales in another order: nobody here does."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=storage).eval()
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        before = model(tokens).logits
        doratune.attach(model, doratune.AdapterConfig(rank=2, targets="all-linear"))
        assert torch.equal(model(tokens).logits, before)
        doratune.verify(model)
        assert torch.equal(model(tokens).logits, before)


def test_a_quantized_transformer_trains_and_merges():
    """A tiny Llama in nf4: the exact start, a few steps, and the merged 16-bit model."""
    bnb = pytest.importorskip("bitsandbytes")
    from conftest import tiny_llama

    model = tiny_llama(dtype=torch.bfloat16).train()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            model.set_submodule(name, layer.to("cpu"))
    ids = torch.randint(3, 300, (2, 17))
    before = model(input_ids=ids).logits
    doratune.attach(model, doratune.AdapterConfig(rank=4))
    assert torch.equal(model(input_ids=ids).logits, before)
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=3e-2))
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        kept = doratune.merge(model)
        merged = model(input_ids=ids).logits
        bytes_ = sum(layer.original.attributes["_parameters"]["weight"].nbytes for _, layer in doratune.adapters(model))
        assert bytes_ < kept < 4 * bytes_  # the scales, and a code of 16 numbers a layer
        assert relative(merged, trained) < 3e-2
        doratune.unmerge(model)
        assert torch.equal(model(input_ids=ids).logits, trained)
