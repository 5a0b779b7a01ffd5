"""Two real processes, DDP and FSDP2, against one process on the whole batch: the same losses, and what is sent for it."""

import pytest
from launching import launched

METHODS = ["lora", "dora", "dora, full gradient", "dora, input axis", "dora, input axis, full gradient"]
METHODS += ["dora, relative", "dvora", "dora, pissa", "dora, whole head"]
AT_THE_ROOT = ["head", "embedding", "blocks alone", "head, input axis, relative"]
WAYS = ["whole model at once", "not resharded after the forward", "offloaded", "by columns", "each layer", "checkpointed"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cases = "ddp", "fsdp", "ways_of_sharding", "attached_after_sharding", "mixed_precision", "collectives", "nf4", "refusals"
    cases += "memory", "other_layers", "after_a_forward", "calls_after_a_forward"
    return launched(tmp_path_factory.mktemp("launch"), *cases)[0]


def same(expected, losses):
    assert len(expected) == len(losses) > 1 and expected[0] != expected[-1]
    assert losses == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_the_losses_are_those_of_one_process(found, engine, method):
    expected, losses, *_ = found[engine][method]
    same(expected, losses)


@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_sharded(found, way):
    expected, losses, preparations = found["ways_of_sharding"][way]
    same(expected, losses)
    assert set(preparations) == {3}  # once a step and layer: not in a recomputation, not for each gathered copy


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_prepared_once_a_step(found, method):
    assert set(found["fsdp"][method][2]) == {3}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("layer", ["Conv1D", "Conv1D, input axis", "embedding", "embedding, by dimension", "experts"])
def test_other_layers(found, layer, order):
    expected, losses = found["other_layers"][f"{layer}, {order}"]
    if (layer, order) == ("experts", "after"):
        assert "MixtralExperts are in shards" in losses and "attach, then fully_shard" in losses
    else:
        same(expected, losses)


def test_nf4(found):
    expected, losses, preparations = found["nf4"]
    same(expected, losses)
    assert set(preparations) == {3}


@pytest.mark.parametrize("way", ["rows", "columns"])
@pytest.mark.parametrize("method", ["lora", "dora", "dora, full gradient", "dora, input axis", "dora, relative", "dvora"])
def test_attached_after_sharding(found, method, way):
    expected, losses, placed = found["attached_after_sharding"][f"{method}, {way}"]
    same(expected, losses)
    assert placed


def test_attached_after_a_sharded_model_has_run(found):
    expected, losses, starts_exactly = found["attached_after_sharding"]["dora, after a run"]
    same(expected, losses)
    assert starts_exactly


@pytest.mark.parametrize("name", AT_THE_ROOT)
def test_what_a_forward_leaves_whole_is_not_what_is_trained(found, name):
    """Forwards with and without gradients before attaching and before the optimizer is made."""
    orders = {key: losses for key, losses in found["after_a_forward"].items() if key.startswith(f"{name}, ")}
    assert len(orders) >= 6
    for order, (expected, losses) in orders.items():
        assert losses == pytest.approx(expected, abs=1e-6), order


@pytest.mark.parametrize("name", ["head", "embedding"])
def test_nor_what_is_written_and_given_back(found, name):
    """load_weights, merge, unmerge, a second adapter and none, an optimizer between forward and backward, each after a forward."""
    case = found["calls_after_a_forward"][name]
    expected, losses = case["steps"]
    assert losses == pytest.approx(expected, abs=1e-6)
    assert case["merged"] is not False and max(case[key] for key in ("loaded", "merged", "back", "in use again")) < 1e-6
    assert case["as before"]


@pytest.mark.parametrize("order", ["early", "late"])
def test_mixed_precision_starts_exactly(found, order):
    """The policy casts W alone: A, B and m meet the norm in fp32, and g = 1 while B = 0, bit for bit."""
    exact, losses, dtypes = found["mixed_precision"][order]
    assert exact and dtypes == ["torch.float32"]
    assert losses == pytest.approx(found["mixed_precision"]["expected"], abs=2e-3)  # of bf16 itself


def test_no_collective_carries_a_norm(found):
    """A step of DoRA sends what LoRA's sends, in as many collectives, and the magnitudes as FSDP2 sends any parameter."""
    dora, lora = found["collectives"]["dora"], found["collectives"]["lora"]
    assert [name for name, _ in dora] == [name for name, _ in lora]
    magnitudes = found["collectives"]["magnitudes"]
    assert all(0 <= d - l <= magnitudes for (_, d), (_, l) in zip(dora, lora, strict=True))


def test_attaching_sends_no_weight(found):
    """Rows: nothing at all. Columns: one all-reduce of O numbers a layer."""
    assert found["collectives"]["attach, rows"] == []
    sent = found["collectives"]["attach, columns"]
    assert 0 < max(numbers for _, numbers in sent) <= found["collectives"]["largest"]
    assert len([name for name, _ in sent if "all_reduce" in name]) == 14


def test_what_reads_whole_weights_is_refused_after_sharding(found):
    assert "attach first, then call fully_shard" in found["refusals"]["start"]
    assert "also_train copies lm_head" in found["refusals"]["also_train"]


@pytest.mark.parametrize("method", ["lora", "dora", "dora, full gradient", "dora, input axis", "dora, relative", "dvora"])
def test_nothing_whole_stays(found, method):
    """Of a model of six layers: factors, w² and a hash's numbers, but no W that was whole before it was sharded."""
    own, beside = found["memory"][method]
    assert beside < 0.4 * own
