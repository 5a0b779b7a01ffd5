"""Something that hides a weight behind others was put on an adapted or a merged layer: refused with the call that takes it off."""

import pytest
import torch
from conftest import one_layer, randomize
from torch import nn
from torch.nn.utils import parametrize, prune

import doratune
from doratune import AdapterConfig
from doratune.errors import UserError


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


WAYS = {
    "weight norm": (nn.utils.weight_norm, "remove_weight_norm", nn.utils.remove_weight_norm),
    "spectral norm": (nn.utils.spectral_norm, "remove_spectral_norm", nn.utils.remove_spectral_norm),
    "parametrized weight norm": (
        nn.utils.parametrizations.weight_norm,
        "remove_parametrizations",
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.1),
        "prune.remove",
        lambda layer: prune.remove(layer, "weight"),
    ),
    "a parametrization of B": (
        lambda layer: parametrize.register_parametrization(layer, "lora_B", Doubled()),
        "remove_parametrizations",
        lambda layer: parametrize.remove_parametrizations(layer, "lora_B", leave_parametrized=False),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_of_an_adapted_layer(way, tmp_path):
    put_on, call, take_off = WAYS[way]
    model, layer = one_layer()
    randomize(model)
    put_on(layer)
    classes = [type(module) for module in model.modules()]
    for action in (doratune.detach, doratune.merge, lambda m: doratune.save(m, tmp_path / "adapter")):
        with pytest.raises(UserError, match=rf"layer cannot be .*{call}"):
            action(model)
    assert [type(module) for module in model.modules()] == classes
    assert not (tmp_path / "adapter").exists()
    assert any(call in problem for problem in doratune.verify(model).problems)
    take_off(layer)
    if not isinstance(layer.weight, nn.Parameter):  # what remove_parametrizations makes of a frozen weight norm
        with pytest.raises(UserError, match="its weight is no parameter any more: make it one again"):
            doratune.detach(model)
        weight = layer._buffers.pop("weight")
        layer.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(3, 10)
    adapted = model(x)
    doratune.merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
    doratune.unmerge(model)
    doratune.detach(model)
    assert type(model.layer) is nn.Linear
    model(x).sum().backward()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("way", [way for way in WAYS if way != "a parametrization of B"])
def test_of_a_merged_layer(way):
    put_on, call, _ = WAYS[way]
    model, layer = one_layer()
    doratune.merge(model)
    put_on(layer)
    with pytest.raises(UserError, match=rf"layer cannot be unmerged.*{call}"):
        doratune.unmerge(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("way", [way for way in WAYS if way != "a parametrization of B"])
def test_before_attach_the_layer_is_left_out(way):
    """As before: a computed weight is no storage that is known."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    WAYS[way][0](model[0])
    doratune.attach(model, AdapterConfig(rank=2))
    assert [name for name, _ in doratune.adapters(model)] == ["1"]
    doratune.detach(model)
