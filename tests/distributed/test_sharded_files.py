"""save, load, verify, inspect, merge and merged_state_dict of a model under FSDP2 are those of the whole model."""

import pytest
from launching import launched
from safetensors.torch import load_file

METHODS = ["dora", "lora", "dora, relative", "dvora", "dora, input axis", "dora, whole head"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("launch"), "whole_files", "loaded_into_shards")


def files(folder, name):
    return {path.name: load_file(path) for path in (folder / name).glob("*.safetensors")}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_one_whole_folder(found, method, steps):
    """Before the first forward and after a step; the second to 1e-6 of what one process trained."""
    key = f"{method}, {steps}"
    sharded, single = (files(found[1], f"{key} {kind}") for kind in ("sharded", "single"))
    assert sharded.keys() == single.keys() and sharded
    for name in single:
        assert sharded[name].keys() == single[name].keys()
        for tensor in single[name]:
            assert (sharded[name][tensor] - single[name][tensor]).abs().max() <= (2e-6 if steps else 0), tensor


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_looks_like_the_whole_model(found, method, steps):
    case = found[0]["whole_files"][f"{method}, {steps}"]
    for name in ("verify", "inspect"):
        sharded, single = case[name]
        assert sharded == single and len(single) > 20
    assert case["merged state"] is not False and case["merged state"] < 2e-6


@pytest.mark.parametrize("method", METHODS)
def test_merges_in_place_and_back(found, method):
    case = found[0]["whole_files"][f"{method}, 1"]
    of_weights, of_outputs = case["merge"]
    assert of_weights is not False and of_weights < 2e-6 and of_outputs < 1e-4
    assert case["back"]
    assert 0 < case["goes on"][0] < 20
    if "whole" in method:
        assert "lm_head.weight: trained whole and in shards" in case["detached"] and "load the base again" in case["detached"]
    else:
        assert case["detached"] == [True, True]
    merged, before = (files(found[1], f"{method}, 1 {kind}") for kind in ("merged", "sharded"))
    assert all((merged[f][k] - t).abs().max() < 1e-6 for f in before for k, t in before[f].items())


@pytest.mark.parametrize("method", ["dora", "dora, relative", "dvora"])
def test_an_adapter_is_loaded_into_shards(found, method):
    assert found[0]["loaded_into_shards"][method] < 1e-6
