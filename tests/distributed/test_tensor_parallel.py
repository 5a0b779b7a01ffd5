"""Two real processes and transformers' tensor-parallel plans, against one process with the whole model."""

from pathlib import Path

import pytest
from launching import launched

SPLIT = Path(__file__).with_name("split_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cases = "trains", "files", "others", "sent", "uneven", "refused"
    return launched(tmp_path_factory.mktemp("launch"), *cases, worker=SPLIT)[0]


def same(expected, losses):
    assert len(expected) == len(losses) > 1 and expected[0] != expected[-1]
    assert losses == pytest.approx(expected, abs=1e-6)


def test_the_losses_are_those_of_one_process(found):
    """LoRA and DoRA, both axes, both gradients, with biases, with a tied head, with the head, checkpointed."""
    assert len(found["trains"]) == 11
    for expected, losses, starts_exactly, prepared in found["trains"].values():
        same(expected, losses)
        assert starts_exactly
        assert prepared in ([len(losses)], [len(losses) + 1])  # once a step, and once for a look before


def test_uneven_parts_of_parallelize_module(found):
    assert len(found["uneven"]) == 4
    for expected, losses, apart in found["uneven"].values():
        same(expected, losses)
        assert apart < 1e-6


def test_files_are_whole_and_are_split_again(found):
    files = found["files"]
    assert all(files[what] < 1e-6 for what in ("loaded", "saved", "merged state", "merged", "exported"))
    assert files["placed"] == [["R", "S(0)", "S(0)"], ["S(1)", "R", "R"]]
    for what in ("verify", "inspect", "generated"):
        split, single = files[what]
        assert split == single
    assert files["back"]
    same(*files["goes on"])
    split, single = files["clipped"]
    assert split == pytest.approx(single, rel=1e-5)


def test_adapters_come_and_go(found):
    others = found["others"]
    assert others["other"] and others["used"] and others["refreshed"] and others["detached"]
    assert others["bf16"] and others["fp32"] == ["torch.float32"]
    same(*others["cancels"])
    assert others["edited"] < 1e-5


def test_what_is_sent(found):
    """Of a block of rank 4: A (I = 32) of five layers split by rows; B, m and a norm (O = 32) of two split by columns."""
    sent, rows, columns = found["sent"], 5, 2
    assert sent["lora, attach"] == []
    assert sent["dora, attach"] == columns * [32]
    assert sent["lora"] == (rows + columns) * [4 * 32]
    assert sent["dora"] == sorted(rows * [4 * 32] + columns * [4 * 32 + 32] + columns * [4 * 32])
    assert sent["dora, the plan's"] == sent["lora, the plan's"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("twice, late", "Linear layers are split by a tensor-parallel plan and in shards of fully_shard, too"),
        ("twice, early", "use one of them"),
        ("one row", "leaves processes without a part"),
        ("disabled", "in all calls alike; doratune.use switches the model"),
        ("mixed", "in all calls alike; doratune.use switches the model"),
        ("dvora", "the factors of vera are not split with it; load the model without them, attach, and shard with fully_shard"),
        ("loha", "the factors of loha are not split with it"),
        ("embedding", "its class Embedding is adapted whole only"),
        ("start", "load the model without its tensor-parallel plan"),
        ("also_train", "load the model without its tensor-parallel plan"),
    ],
)
def test_what_is_refused(found, what, words):
    assert words in found["refused"][what] and "\n" not in found["refused"][what]
