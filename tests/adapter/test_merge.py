"""A merged model is a plain one: no hook, no preparation; unmerged it is watched again, and so is a copy."""

import copy

import pytest
import torch
from conftest import randomize, tiny_llama

import doratune
from doratune.errors import UserError

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def hooks(model):
    return [len(kept) for m in model.modules() for kept in (m._forward_pre_hooks, m._forward_hooks) if kept]


def trained():
    """A model after one step, so that everything derived is old."""
    model = randomize(doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=3, targets=["q_proj", "down_proj"])))
    optimizer = torch.optim.SGD(doratune.parameter_groups(model, lr=0.1))
    model(IDS).logits.square().mean().backward()
    optimizer.step()
    return model


def test_a_merged_model_asks_nothing_and_an_unmerged_one_again():
    plain, model = hooks(tiny_llama()), trained()
    watched, weights = hooks(model), [layer.adapted for _, layer in doratune.adapters(model)]
    assert watched != plain
    y = copy.deepcopy(model)(IDS).logits
    doratune.merge(model)
    counts = [weight.preparations for weight in weights]
    for _ in range(2):
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-5)
    assert hooks(model) == plain and [weight.preparations for weight in weights] == counts
    for one in (copy.deepcopy(model), model):
        doratune.unmerge(one)
        assert hooks(one) == watched and torch.equal(one(IDS).logits, y)
        for _, layer in doratune.adapters(one):
            layer.magnitude.data.mul_(1.5)  # no version counter tells
        assert not torch.allclose(one(IDS).logits, y, rtol=1e-2)
    assert hooks(doratune.detach(model)) == plain


def test_a_refused_merge_leaves_it_watched():
    model = trained()
    watched = hooks(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        doratune.merge(model)
    assert hooks(model) == watched
