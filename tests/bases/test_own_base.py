"""A storage of one's own is one class: a linear layer that keeps int8 rows and a scale each, which is no nn.Linear or is one."""

import copy
import io

import grid
import pytest
import reference
import torch
from conftest import tiny_llama
from torch import nn

import doratune
from doratune import AdapterConfig, UserError, bases
from doratune.bases.quantized import QuantizedBase


class Packed:
    def store(self, linear):
        self.bias, (codes, scale) = linear.bias, packed(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def rows(self, which=slice(None)):
        return self.codes[which] * self.scale[which]

    def forward(self, x):
        return nn.functional.linear(x, self.rows(), self.bias)


class Int8(Packed, nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.store(linear)


class Int8Linear(Packed, nn.Linear):
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        del self.weight
        self.store(linear)


def packed(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class Int8Base(QuantizedBase):
    name = "int8 rows"
    modules = (Int8, Int8Linear)

    def dtype(self, module):
        return module.scale.dtype

    def held(self, module):
        return module.codes, module.scale

    def forward_rows(self, module, rows_KI):
        return rows_KI.to(self.dtype(module)) @ module.rows().T

    def rows(self, module, which):
        return module.rows(which)

    def requantize_refusal(self, module):
        return None

    def requantized(self, module, weight_OI):
        module.codes, module.scale = packed(weight_OI)


@pytest.fixture(autouse=True)
def int8():
    yield bases.add(Int8Base)
    bases.remove("int8 rows")


def attached(cls=Int8, **settings):
    """(a model of two such layers, its first layer, an input)."""
    torch.manual_seed(0)
    model = nn.Sequential(cls(nn.Linear(10, 13)), nn.Tanh(), cls(nn.Linear(13, 6)))
    return doratune.attach(model, AdapterConfig(rank=3, alpha=5.0, **settings)), model[0], torch.randn(80, 10)


@pytest.mark.parametrize("cls", [Int8, Int8Linear])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_it_starts_exact_trains_and_computes_dora(cls, axis):
    model, layer, x = attached(cls, magnitude_axis=axis)
    plain = doratune.detach(attached(cls)[0])
    assert torch.equal(model(x), plain(x)) and doratune.verify(model, example=x).ok
    rows = doratune.inspect(model).rows
    assert {(row.kind, row.base, row.shape) for row in rows} == {("Linear", "int8 rows", shape) for shape in ((13, 10), (6, 13))}
    before, codes, losses = layer.magnitude.clone(), layer.codes.clone(), []
    optimizer, target = torch.optim.AdamW(doratune.parameter_groups(model, lr=0.01)), torch.randn(80, 6)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] and not torch.equal(layer.magnitude, before) and torch.equal(layer.codes, codes)
    for factor in (1, 2):  # an edit of W is seen
        layer.scale.mul_(factor)
        W = reference.merged(layer.rows(), layer.lora_A, layer.lora_B, layer.magnitude, layer.scaling, axis)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, W, layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [Int8, Int8Linear])
def test_saved_loaded_merged_copied(cls, tmp_path):
    model, layer, x = attached(cls)
    grid.move(layer), grid.move(model[2])
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    torch.save(model, file := io.BytesIO())
    assert torch.equal(torch.load(io.BytesIO(file.getvalue()), weights_only=False)(x), y)
    doratune.save(model, tmp_path, "peft")
    assert torch.equal(doratune.load(doratune.detach(attached(cls)[0]), tmp_path)(x), y)
    again, codes = copy.deepcopy(model), layer.codes
    doratune.merge(model)
    assert type(layer) is nn.Linear and not hasattr(layer, "codes")
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    doratune.unmerge(model)
    assert isinstance(layer, cls) and layer.codes is codes and torch.equal(model(x), y)
    doratune.merge(again, quantized="same")
    assert type(again[0]) is cls and again[0].codes.dtype == torch.int8
    assert (again(x) - y).norm() < 0.03 * y.norm()


def test_layers_inside_a_model_are_found_and_lost_with_the_storage():
    model, config = tiny_llama(layers=1), AdapterConfig(rank=2, targets=["down_proj"])
    model.model.layers[0].mlp.down_proj = Int8(model.model.layers[0].mlp.down_proj)
    newer = bases.add(type("Newer", (Int8Base,), {"name": "int8 rows"}))  # takes the other's place
    assert [type(layer.adapted.base) for _, layer in doratune.adapters(doratune.attach(model, config))] == [newer]
    bases.remove("int8 rows")
    with pytest.raises(UserError, match="is an Int8, which has no adapter"):
        doratune.attach(doratune.detach(model), config)


@pytest.mark.parametrize(("attributes", "message"), [
    ({"rows": QuantizedBase.rows}, "'broken' does not define rows; see"),
    ({"dtype": bases.Base.dtype, "held": QuantizedBase.held}, "'broken' does not define dtype, held; see"),
    ({"modules": ()}, "'broken' does not define modules; see"),
    ({"name": "torchao"}, "'torchao': there is a storage of that name"),
    ({"name": None}, "has no name of its own"),
])  # fmt: skip
def test_incomplete_storages_are_one_line(attributes, message):
    with pytest.raises(UserError, match=message + "[^\n]*$"):
        bases.add(type("Broken", (Int8Base,), {"name": "broken"} | attributes))
