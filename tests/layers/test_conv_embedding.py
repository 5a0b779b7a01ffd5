"""Convolutions and embeddings beyond the grid: layouts, in-place operations, autocast, compile, cost, refusals."""

import copy

import grid
import pytest
import torch
from conftest import tiny_llama
from torch import nn

import doratune
from doratune import AdapterConfig
from doratune.bases.dense import DenseBase
from doratune.errors import UserError


def conv_model(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3, groups=2)).to(dtype)
    doratune.attach(model, AdapterConfig(**{"rank": 3, "targets": ["0", "2"]} | settings))
    for i, layer in enumerate((model[0], model[2])):
        grid.move(layer, seed=i)
    return model


def gradients(model, x, dY):
    model.zero_grad()
    y = model(x)
    y.backward(dY)
    return [y.detach()] + [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full", ["detached", "full"])
def test_both_layouts_give_the_same_and_stay(dtype, full):
    model = conv_model(dtype, norm_gradient=full)
    x, dY = torch.randn(2, 6, 7, 9).to(dtype), torch.randn(2, 4, 5, 7).to(dtype)
    plain = gradients(model, x, dY)
    assert model[0](x).is_contiguous()
    channels_last = gradients(model, x.to(memory_format=torch.channels_last), dY)
    assert model[0](x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.15}
    for a, b in zip(plain, channels_last, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_weights_in_channels_last_merge_and_unmerge():
    model = conv_model()
    doratune.detach(model)
    model.to(memory_format=torch.channels_last)
    doratune.attach(model, AdapterConfig(rank=3, targets=["0", "2"]))
    for layer in (model[0], model[2]):
        grid.move(layer)
    x, before = torch.randn(2, 6, 7, 9), model[0].weight.clone()
    y = model(x)
    doratune.merge(model)
    assert not torch.equal(model[0].weight, before)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    doratune.unmerge(model)
    assert torch.equal(model[0].weight, before)


def test_a_change_in_place_of_the_output_is_no_error():
    model = conv_model()
    other = copy.deepcopy(model)
    other[1] = nn.ReLU(inplace=False)
    x, dY = torch.randn(2, 6, 7, 9), torch.randn(2, 4, 5, 7)
    for a, b in zip(gradients(model, x, dY), gradients(other, x, dY), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_a_pointwise_convolution_is_the_linear_layer(axis):
    torch.manual_seed(0)
    conv, linear = nn.Sequential(nn.Conv2d(6, 8, 1)), nn.Sequential(nn.Linear(6, 8))
    with torch.no_grad():
        linear[0].weight.copy_(conv[0].weight.flatten(1))
        linear[0].bias.copy_(conv[0].bias)
    for model in (conv, linear):
        doratune.attach(model, AdapterConfig(rank=3, targets=["0"], magnitude_axis=axis))
        grid.move(model[0])
    x, dY = torch.randn(2, 6, 5, 4), torch.randn(2, 8, 5, 4)
    of_conv = gradients(conv, x, dY)
    of_linear = gradients(linear, x.movedim(1, -1), dY.movedim(1, -1))
    torch.testing.assert_close(of_conv[0], of_linear[0].movedim(-1, 1))
    for a, b in zip(of_conv[1:], of_linear[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_unbatched_and_empty_inputs():
    model = conv_model()
    x = torch.randn(6, 7, 9)
    torch.testing.assert_close(model(x), model(x[None])[0])
    assert model(x[None][:0]).shape == (0, 4, 5, 7)


def test_autocast_keeps_the_base_dtype():
    model = conv_model()
    x = torch.randn(2, 6, 7, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - model(x)).norm() < 0.02 * model(x).norm()
    y.float().sum().backward()
    assert model[0].lora_A.grad.dtype == torch.float32


def test_conv_and_embedding_under_compile_one_norm_a_step():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(20, 6), nn.Conv1d(6, 8, 3)

        def forward(self, ids):
            return torch.relu_(self.conv(self.embed(ids).transpose(1, 2)))

    model = doratune.attach(Model(), AdapterConfig(rank=3, targets=["embed", "conv"]))
    for layer in (model.embed, model.conv):
        grid.move(layer)
    plain, ids = copy.deepcopy(model), torch.randint(0, 20, (4, 40))
    compiled = torch.compile(model, fullgraph=True)
    optimizer = torch.optim.SGD(doratune.parameter_groups(model, lr=1e-3), foreach=False)
    other = torch.optim.SGD(doratune.parameter_groups(plain, lr=1e-3), foreach=False)
    before = model.conv.adapted.preparations
    for step in range(3):
        for how, opt in ((compiled, optimizer), (plain, other)):
            how(ids).square().mean().backward()
            opt.step()
            if step < 2:
                opt.zero_grad()
    assert model.conv.adapted.preparations == before + 3
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_embedding_computes_norms_of_looked_up_rows_only(monkeypatch):
    torch.manual_seed(0)
    model = doratune.attach(nn.Sequential(nn.Embedding(1000, 16)), AdapterConfig(rank=4, targets=["0"]))
    layer = model[0]
    grid.move(layer)

    def refused(*_):
        raise AssertionError("the whole table was read")

    monkeypatch.setattr(DenseBase, "forward_rows", refused)
    monkeypatch.setattr(DenseBase, "row_tiles", refused)
    y = layer(torch.tensor([[3, 3, 999]]))
    y.sum().backward()
    assert layer.magnitude.grad.nonzero().flatten().tolist() == [3, 999]
    assert layer.lora_B.grad.abs().sum(1).nonzero().flatten().tolist() == [3, 999]
    assert layer.adapted.preparations == 0


def test_the_padding_row_is_not_trained():
    model = doratune.attach(nn.Sequential(nn.Embedding(10, 6, padding_idx=2)), AdapterConfig(rank=2, targets=["0"]))
    grid.move(model[0])
    model(torch.tensor([2, 2, 5])).sum().backward()
    assert model[0].lora_B.grad[2].abs().sum() == 0 and model[0].magnitude.grad[2] == 0
    assert model[0].lora_B.grad[5].abs().sum() > 0


@pytest.mark.parametrize("settings", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_embeddings_that_cannot_be_adapted(settings):
    with pytest.raises(UserError, match=r"max_norm rewrites|sparse or frequency"):
        doratune.attach(nn.Sequential(nn.Embedding(10, 6, **settings)), AdapterConfig(rank=2, targets=["0"]))


def test_a_tied_embedding_is_never_adapted_silently():
    for targets in (["embed_tokens"], ["embed_tokens", "lm_head"]):
        with pytest.raises(UserError, match="is tied to"):
            doratune.attach(tiny_llama(tie=True), AdapterConfig(targets=targets, rank=4))
    model = doratune.attach(tiny_llama(), AdapterConfig(targets=["embed_tokens", "lm_head"], rank=4))
    assert len(dict(doratune.adapters(model))) == 2


def test_a_subclass_with_a_forward_of_its_own_is_tried():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    class Renamed(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    for layer, reason in ((Doubled(4, 4, 3), "is not a plain convolution"), (Shifted(10, 4), "is not a row of its weight")):
        with pytest.raises(UserError, match=reason):
            doratune.attach(nn.Sequential(layer), AdapterConfig(rank=2, targets=["0"]))
    model = doratune.attach(nn.Sequential(Renamed(4, 4, 3)), AdapterConfig(rank=2, targets=["0"]))
    assert model(torch.randn(1, 4, 5, 5)).shape == (1, 4, 3, 3)


def test_a_transposed_convolution_has_no_adapter():
    with pytest.raises(UserError, match="ConvTranspose2d, which has no adapter"):
        doratune.attach(nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), AdapterConfig(rank=2, targets=["0"]))


def test_dropout_is_on_the_low_rank_branch_of_a_convolution():
    model = conv_model(dropout=0.5)
    x = torch.randn(2, 6, 7, 9)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_few_positions_of_a_grouped_convolution(groups):
    """Where conv(x, A) is smaller than ΔV, it is what is computed; many positions take ΔV's own convolution (the grid's cases)."""
    torch.manual_seed(0)
    model = doratune.attach(nn.Sequential(nn.Conv2d(64, 32, 3, groups=groups)), AdapterConfig(rank=3, targets=["0"]))
    layer = model[0]
    grid.move(layer)
    x = torch.randn(1, 64, 3, 3)
    assert x[0, 0].numel() * 3 * groups < layer.weight.numel()
    V = layer.weight.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).view(layer.weight.shape)
    W = layer.magnitude.double().view(-1, 1, 1, 1) * V / V.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    exact = nn.functional.conv2d(x.double(), W, layer.bias.double(), groups=groups)
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-4, atol=1e-5)
