"""A direction of one's own is one class: all that the package does with a direction works for it, and nothing else is edited.

ΔV = s·B·diag(b)·A        A frozen, b starts at the setting `first_b`, B at 0
"""

import copy
import io
import json

import pytest
import torch
import yaml
from conftest import one_layer, tiny_llama
from torch import nn

import doratune
from doratune import AdapterConfig, UserError, directions
from doratune.directions import Declared, Direction


class Diagonal(Direction):
    name = "diagonal"
    methods = {"diag": False, "ddiag": True}
    settings = {"first_b": 0.5}
    tensors = (
        Declared("diag_A", lambda O, I, R: (R, I), trained=False),
        Declared("diag_b", lambda O, I, R: (R,)),
        Declared("diag_B", lambda O, I, R: (O, R), output_factor=True),
    )

    def __init__(self, first_b=0.5):
        self.first_b = first_b

    def for_model(self, config, shapes):
        return Diagonal(config.setting("first_b"))

    def first(self, name, size, shape, dtype, generator):
        if name == "diag_A":
            return torch.randn(size, dtype=dtype, generator=generator) * shape[1] ** -0.5
        return torch.full(size, self.first_b if name == "diag_b" else 0.0, dtype=dtype)

    def factors(self, tensors, shape):
        A, b, B = tensors
        return A, B * b


SETTINGS = {"method": "ddiag", "rank": 4, "direction_settings": {"first_b": 0.25}}


@pytest.fixture(autouse=True)
def diagonal():
    yield directions.register(Diagonal())
    directions.unregister("diagonal")


def trained(method="ddiag", steps=20):
    """(a layer after some steps, its input, the losses, its parameters before)."""
    model, layer = one_layer(13, 10, **SETTINGS | {"method": method})
    before = {name: p.clone() for name, p in layer.named_parameters()}
    x, target = torch.randn(80, 10), torch.randn(80, 13)
    optimizer, losses = torch.optim.AdamW(doratune.parameter_groups(model, lr=0.01, output_factor_lr_ratio=4)), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return model, layer, x, losses, before


@pytest.mark.parametrize("method", ["diag", "ddiag"])
def test_it_trains_and_computes_its_formula(method):
    model, layer, x, losses, before = trained(method)
    moved = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"diag_b", "diag_B"} | ({"magnitude"} if method == "ddiag" else set())
    assert losses[-1] < losses[0] and (before["diag_b"] == 0.25).all()
    V = layer.weight + layer.scaling * layer.diag_B @ torch.diag(layer.diag_b) @ layer.diag_A
    W = V if method == "diag" else V * (layer.magnitude / V.norm(dim=1))[:, None]
    torch.testing.assert_close(model(x), nn.functional.linear(x, W, layer.bias), rtol=1e-5, atol=1e-5)


def test_groups_inspect_and_verify():
    model, layer = one_layer(13, 10, **SETTINGS)
    groups = {g["name"]: g for g in doratune.parameter_groups(model, 1e-3, output_factor_lr_ratio=16)}
    assert groups["output_factors"]["params"] == [layer.diag_B] and groups["output_factors"]["lr"] == 16e-3
    assert groups["factors"]["params"] == [layer.diag_b] and groups["magnitude"]["params"] == [layer.magnitude]
    (row,) = doratune.inspect(model).rows
    assert (row.direction, row.trainable) == ("diagonal", 4 + 13 * 4 + 13)
    assert doratune.verify(model, example=torch.randn(2, 10)).ok
    layer.diag_b.requires_grad_(False)
    assert "diag_b is not trainable" in str(doratune.verify(model))
    assert one_layer(13, 10, method="diag")[1].diag_b[0] == 0.5  # the declared default
    with pytest.raises(UserError, match="method ddiag has no setting 'frist_b'; did you mean 'first_b'"):
        AdapterConfig(method="ddiag", direction_settings={"frist_b": 1})


def test_saved_loaded_merged_copied(tmp_path):
    model, layer, x, *_ = trained()
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    torch.save(model, file := io.BytesIO())
    assert torch.equal(torch.load(io.BytesIO(file.getvalue()), weights_only=False)(x), y)
    doratune.save(model, tmp_path)
    assert json.loads((tmp_path / "doratune.json").read_text())["adapter"]["direction_settings"] == {"first_b": 0.25}
    assert torch.equal(doratune.load(doratune.detach(one_layer(13, 10)[0]), tmp_path)(x), y)
    with pytest.raises(UserError, match="method is 'ddiag', which PEFT has not"):
        doratune.save(model, tmp_path / "peft", format="peft")
    W = layer.weight.clone()
    doratune.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    doratune.unmerge(model)
    assert torch.equal(layer.weight, W) and torch.equal(model(x), y)


def test_a_recipe_trains_it(tiny_folder, tmp_path):
    from doratune.training.recipe import TrainRecipe
    from doratune.training.train import train

    rows = [{"instruction": f"Is {i} even?", "input": "", "output": str(i % 2 == 0)} for i in range(16)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    recipe = TrainRecipe(model=str(tiny_folder), data=str(tmp_path / "data.json"), output=str(tmp_path / "run"), **SETTINGS)
    recipe.dtype, recipe.batch_size, recipe.max_steps, recipe.targets = "float32", 4, 3, ["q_proj"]
    recipe.check()
    train(recipe, say=str)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["direction_settings"] == {"first_b": 0.25}
    model = doratune.load(tiny_llama(), tmp_path / "run" / "adapter")
    assert all(layer.diag_B.any() for _, layer in doratune.adapters(model))


def declared(**attributes):
    return type("Broken", (Diagonal,), {"name": "broken", "methods": {"broken": False}} | attributes)()


@pytest.mark.parametrize(("attributes", "message"), [
    ({"tensors": (Declared("b"),)}, "'broken': b has no shape"),
    ({"tensors": (Declared("b", lambda O, I, R: (R,)),) * 2}, "'broken': two tensors are called b"),
    ({"tensors": (Declared("magnitude", lambda O, I, R: (R,)),)}, "'broken': a tensor cannot be called magnitude"),
    ({"tensors": (Declared("b", lambda O, I, R: (R,), in_file="lora_A.weight"),)}, "'broken': in a file, lora_A.weight would"),
    ({"methods": {"dora": True}}, "'broken': method 'dora' belongs to direction 'lora'"),
    ({"methods": {}}, "'broken': it has no method"),
    ({"name": "vera"}, "'vera': there is a direction of that name"),
    ({"factors": Direction.factors}, "'broken': it does not define factors"),
    ({"name": None}, "is no direction"),
])  # fmt: skip
def test_impossible_declarations_are_one_line(attributes, message):
    known = list(directions.METHODS)
    with pytest.raises(UserError, match=message + "[^\n]*$"):
        directions.register(declared(**attributes))
    assert list(directions.METHODS) == known
