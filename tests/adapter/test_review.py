"""What a review of the layers found: each a silent wrong number or a lost model, each with the smallest case that shows it."""

import copy
import io

import peft
import pytest
import torch
from conftest import one_layer, tiny_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune
from doratune import AdapterConfig
from doratune.checkpoint.adapter import load_weights
from doratune.checkpoint.merge import merge_checkpoint
from doratune.errors import UserError


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_draws_one_mask_with_and_without_gradients(method):
    model, layer = one_layer(18, 12, method=method, dropout=0.3)
    nn.init.normal_(layer.lora_B)
    x, c = torch.randn(9, 12, requires_grad=True), torch.randn(9, 18)
    model.train()
    torch.manual_seed(1)
    expected = model(x)
    after = torch.rand(1)
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(2)
    y = checkpoint(model, x, use_reentrant=True)
    (y * c).sum().backward()
    got = layer.lora_B.grad.clone()
    layer.zero_grad()
    torch.manual_seed(2)
    (model(x) * c).sum().backward()
    torch.testing.assert_close(got, layer.lora_B.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile's own, after the break
def test_a_base_without_gradient_under_compile_still_lets_gradients_through():
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    torchao.quantize_(model[1], torchao.Int8DynamicActivationInt8WeightConfig())
    doratune.attach(model, AdapterConfig(rank=3, targets=["0", "1"]))
    assert not model[1].adapted.base.has_gradient
    x, t = torch.randn(2, 16, 64).bfloat16()

    def gradient(call):
        model.zero_grad()
        (call(x) * t).sum().backward()
        return model[0].magnitude.grad.clone()

    torch.testing.assert_close(gradient(torch.compile(model, backend="aot_eager")), gradient(model), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("settings", [{}, {"magnitude_axis": "input"}, {"method": "lora"}])
def test_a_base_without_gradient_where_pytorch_says_that_it_compiles(settings, monkeypatch):
    """As it does in code that runs untraced within a compilation."""
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    torchao.quantize_(model[0], torchao.Int8DynamicActivationInt8WeightConfig())
    doratune.attach(model, AdapterConfig(rank=3, targets=["0"], **settings))
    x = torch.randn(4, 64).bfloat16()
    y = model(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(model(x), y)


def test_merging_on_disk_keeps_a_head_that_was_tied_to_trained_embeddings(tmp_path):
    from transformers import LlamaForCausalLM

    tiny_llama(tie=True).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    doratune.attach(model, AdapterConfig(rank=4, targets=["q_proj"], also_train=["embed_tokens"]))
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.1 * torch.randn_like(model.model.embed_tokens.weight))
        ids = torch.arange(20)[None]
        expected = model(ids).logits
        doratune.save(model, tmp_path / "adapter")
        merge_checkpoint(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_original_of_a_transposed_layer_is_read_as_its_class_stores_it():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    original, coarse = nn.Sequential(Conv1D(32, 32)), nn.Sequential(nn.Linear(32, 32))
    with torch.no_grad():
        coarse[0].weight.copy_((original[0].weight.T * 40).round() / 40)
    doratune.attach(coarse, AdapterConfig(rank=8, start="loftq", targets=["0"]), original=original)
    V = coarse[0].weight + coarse[0].scaling * coarse[0].lora_B @ coarse[0].lora_A
    W = original[0].weight.T
    assert (W - V).norm() < 0.9 * (W - coarse[0].weight).norm()
    conv = nn.Sequential(nn.Conv2d(3, 8, 3))
    doratune.attach(conv, AdapterConfig(rank=2, magnitude_from="original", targets=["0"]), original=copy.deepcopy(conv))
    assert torch.equal(conv[0].magnitude, conv[0].adapted.facts.w2.sqrt())


def vera(seed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 18), nn.Linear(18, 12))
    doratune.attach(model, AdapterConfig(method="dvora", rank=6, seed=seed))
    with torch.no_grad():
        for layer in model:
            layer.vera_b.normal_()
    return model


def test_copies_of_a_vera_model_have_pairs_of_their_own(tmp_path):
    doratune.save(vera(7), tmp_path)
    model, x = vera(0), torch.randn(4, 12)
    y = model(x)
    copied = copy.deepcopy(model)
    assert copied[0].adapted.direction.shared is copied[1].adapted.direction.shared
    load_weights(copied, tmp_path)
    doratune.refresh(model)
    assert torch.equal(model(x), y) and not torch.equal(copied(x), y)


def test_veras_pair_does_not_depend_on_the_default_dtype():
    model, x = vera(3), torch.randn(4, 12)
    y, buffer = model(x), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    torch.set_default_dtype(torch.float64)
    try:
        again = torch.load(buffer, weights_only=False)
        again[0].adapted.direction.shared.get(torch.device("cpu"), torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(again(x), y)


def test_veras_pair_in_a_folder_is_checked(tmp_path):
    from safetensors.torch import load_file, save_file

    doratune.save(vera(7), tmp_path)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    for change, message in (
        ({"base_model.vera_A": torch.zeros(4, 2)}, "do not fit"),
        ({"base_model.vera_A": None}, "vera_A is missing beside vera_B"),
    ):
        save_file({k: t for k, t in (whole | change).items() if t is not None}, tmp_path / "adapter_model.safetensors")
        model = nn.Sequential(nn.Linear(12, 18), nn.Linear(18, 12))
        with pytest.raises(UserError, match=message):
            doratune.load(model, tmp_path)
        assert not list(doratune.adapters(model))


def test_vera_compiles_whole_without_a_call_before():
    model, x = vera(1), torch.randn(4, 12)
    torch.testing.assert_close(torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_a_start_on_nothing_still_learns(start):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 18))
    if start == "pissa":
        nn.init.zeros_(model[0].weight)
    doratune.attach(model, AdapterConfig(rank=3, start=start, targets=["0"]), original=copy.deepcopy(model))
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=0.02))
    x, t = torch.randn(20, 12), torch.randn(20, 18)
    losses = []
    for _ in range(100):
        loss = (model(x) - t).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model[0].lora_B.abs().max() > 0 and losses[-1] < losses[0] - 0.1


def test_weights_tied_by_their_memory_are_tied():
    model = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 12, bias=False))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(UserError, match=r"1\.weight is tied to 0\.weight"):
        doratune.attach(model, AdapterConfig(rank=2, targets=["1"]))


def test_all_layers_leaves_tied_ones_out():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    doratune.attach(model, AdapterConfig(rank=2))
    assert [name for name, _ in doratune.adapters(model)] == ["2"]
    assert "tied" in doratune.verify(model).left_out["0"]


def test_an_embeddings_dropout_is_not_in_its_norm():
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(30, 12)), torch.arange(30)
    doratune.attach(model, AdapterConfig(rank=3, alpha=4.5, targets=["0"], dropout=0.5))
    layer = model[0]
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.magnitude.copy_(2 * (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).norm(dim=1))
        mean = torch.stack([model.train()(ids) for _ in range(3000)]).mean(0)
        exact = model.eval()(ids)
    assert (mean - exact).norm() / exact.norm() < 0.03


def test_an_embedding_near_cancellation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 12))
    doratune.attach(model, AdapterConfig(rank=12, alpha=12, targets=["0"]))
    layer = model[0]
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(12))
        layer.lora_B.copy_(-0.96 * layer.weight)
        layer.magnitude.mul_(1.3)
        V = layer.weight.double() + layer.lora_B.double() @ layer.lora_A.double()
        exact = layer.magnitude.double()[:, None] * V / V.norm(dim=1, keepdim=True)
        got = layer(torch.arange(20))
    assert (got - exact).norm() / exact.norm() < 5e-6


@pytest.mark.parametrize("trained", [True, False])
def test_a_dimension_of_zeros_computes_the_same_in_peft(trained, tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(12, 6))
        with torch.no_grad():
            model[0].weight[:, 4] = 0.0
        return model

    model, ids = build(), torch.arange(12)
    doratune.attach(model, AdapterConfig(rank=2, targets=["0"], embedding_magnitude="dimension"))
    if trained:
        nn.init.normal_(model[0].lora_B)
    doratune.save(model, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids), model.eval()(ids), rtol=1e-4, atol=1e-5)


def test_a_relative_magnitude_keeps_what_decay_pulls_it_to(tmp_path):
    model, layer = one_layer(13, 10, magnitude_form="relative")
    with torch.no_grad():
        layer.magnitude_start.mul_(1.7)
        layer.magnitude_delta.normal_(std=0.2)
    doratune.save(model, tmp_path)
    again, _ = one_layer(13, 10)
    doratune.detach(again)
    doratune.load(again, tmp_path, trainable=True)
    torch.testing.assert_close(again.layer.magnitude_start, layer.magnitude_start)
    torch.testing.assert_close(again.layer.magnitude, layer.magnitude)


def test_a_norm_does_not_depend_on_which_sibling_is_called_first():
    class Rounding(nn.Module):
        in_features, out_features, bias = 24, 16, None

        def __init__(self, rounds):
            super().__init__()
            self.rounds = rounds
            self.W = nn.Parameter(torch.randn(16, 24), requires_grad=False)

        def forward(self, x):
            return ((x * 8).round() / 8 if self.rounds else x) @ self.W.T

    doratune.bases.register(lambda m: isinstance(m, Rounding), rows=lambda m, which: m.W[which], name="rounding, for a test")
    try:
        torch.manual_seed(0)
        model = nn.Sequential(Rounding(False), nn.Linear(16, 24), Rounding(True))
        doratune.attach(model, AdapterConfig(rank=3, targets=["0", "2"]))
        assert [model[i].adapted.base.exact_forward for i in (0, 2)] == [True, False]
        optimizer = torch.optim.SGD(doratune.parameter_groups(model, lr=1e-4))
        for _ in range(3):
            model(torch.randn(6, 24)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model(torch.randn(6, 24))
        for i in (0, 2):
            layer = model[i]
            exact = (layer.W.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)
            n = layer.adapted.n(torch.float32)
            torch.testing.assert_close(n.double(), exact, rtol=1e-6, atol=0)
    finally:
        doratune.bases.opaque.REGISTERED.pop("rounding, for a test")


def test_an_adapter_that_left_small_layers_out_comes_back(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 18), nn.Linear(18, 2))

    model = doratune.attach(build(), AdapterConfig(rank=4))
    assert "1" in doratune.verify(model).left_out
    nn.init.normal_(model[0].lora_B)
    doratune.save(model, tmp_path)
    x = torch.randn(3, 12)
    assert torch.equal(doratune.load(build(), tmp_path)(x), model(x))


def test_a_start_that_fails_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(12, 18), nn.Linear(18, 8))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    keys = set(model.state_dict())
    with pytest.raises(UserError, match="NaN or infinite"):
        doratune.attach(model, AdapterConfig(rank=4, targets=["0", "1"], start="pissa"))
    assert set(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())
    assert type(model[0]) is nn.Linear
    doratune.attach(model, AdapterConfig(rank=4, targets=["0"]))


def test_magnitudes_alone_under_dvora_are_saved(tmp_path):
    model, layer = one_layer(13, 10, method="dvora", targets=[], magnitude_only=["layer"])
    doratune.save(model, tmp_path)
    again, _ = one_layer(13, 10)
    doratune.detach(again)
    x = torch.randn(3, 10)
    assert torch.equal(doratune.load(again, tmp_path)(x), model(x))


def test_originals_that_do_not_fit_are_one_line():
    model = nn.Sequential(nn.Linear(12, 18))
    for original in (nn.Sequential(), lambda name: None, nn.Sequential(nn.ReLU())):
        with pytest.raises(UserError, match="no weight named 0"):
            doratune.attach(model, AdapterConfig(rank=2, start="loftq", targets=["0"]), original=original)


def test_a_quantized_module_cannot_be_trained_whole(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    with pytest.raises(UserError, match="also_train: 1 is quantized"):
        doratune.attach(model, AdapterConfig(rank=2, targets=["0"], also_train=["1"]))
