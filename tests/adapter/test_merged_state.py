"""`merged_state_dict`: what merging would give, with the live model untouched."""

import copy

import dense
import pytest
import storages
import torch
from conftest import randomize

import doratune
from doratune.errors import UserError


def same(one, other):
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    for key in one:
        assert one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]), key


def merged_copy(model):
    twin = copy.deepcopy(model)
    doratune.merge(twin, keep="none")
    return twin.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"magnitude_axis": "input"}, {"method": "dvora"}, {"start": "pissa"}, {"method": "lora"}])
def test_it_is_what_merging_gives(dtype, settings):
    torch.manual_seed(0)
    model = dense.Mixed().to(dtype)
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets="all-layers", **settings))
    randomize(model)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    same(doratune.merged_state_dict(model), merged_copy(model))
    same(model.state_dict(), before)


def test_whole_modules_are_in_the_dtype_that_they_compute_in():
    model = dense.Mixed().to(torch.bfloat16)
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["up"], also_train=["mix"]))
    same(doratune.merged_state_dict(randomize(model)), merged_copy(model))


def test_experts():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager",
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets="all-layers"))
    same(doratune.merged_state_dict(randomize(model)), merged_copy(model))


def test_a_quantized_layer_has_one_dense_weight():
    model = storages.BASES["nf4"](torch.bfloat16).model
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["layer"]))
    same(doratune.merged_state_dict(randomize(model)), merged_copy(model))


def test_a_merged_model_and_a_plain_one_are_refused():
    model = dense.Mixed()
    with pytest.raises(UserError, match="no adapter is attached"):
        doratune.merged_state_dict(model)
    doratune.attach(model, doratune.AdapterConfig(rank=2))
    doratune.merge(model)
    with pytest.raises(UserError, match="merged"):
        doratune.merged_state_dict(model)
