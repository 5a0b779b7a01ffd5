"""Loading in shards, PyTorch's own checkpoints, and engines that are refused with the way out; DeepSpeed where it is installed."""

import importlib.util
import json
from pathlib import Path

import pytest
from launching import WORKER, launched
from safetensors.torch import load_file

STORED = "odd sizes, several files", "bf16 in the files", "tied, Conv1D", "experts beside it", "rank below the processes"
SUMMED = "tied, Conv1D", "input axis"
STORED += "head", "input axis", "in bf16"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cases = "loaded_in_shards", "own_parts", "memory_of_loading", "checkpoints_of_pytorch", "other_engines"
    found, folder = launched(tmp_path_factory.mktemp("launch"), *cases, MALLOC_MMAP_THRESHOLD_="65536")  # freed blocks are gone
    return found | {"folder": folder}


def test_a_base_that_transformers_loads_in_shards(found):
    """No process ever has the whole base; the adapter's parameters are in shards with it."""
    expected, losses, placed, own, whole = found["loaded_in_shards"]
    assert losses == pytest.approx(expected, abs=1e-6) and placed
    assert own <= 0.51 * whole


@pytest.mark.parametrize(("number", "name"), enumerate(STORED))
def test_a_base_of_which_each_process_reads_its_part(found, number, name):
    """The start is that of a whole base: outputs bit for bit, and the adapter's files; magnitudes that are summed over columns or
    for the input axis but for the last bit."""
    same_outputs, share, expected, losses = found["own_parts"][name]
    assert same_outputs and share <= 0.51
    assert losses == pytest.approx(expected, abs=2e-5 if "bf16" in name else 2e-6)
    folders = [found["folder"] / f"stored {number}" / kind for kind in ("parts", "whole")]
    parts, whole = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    own, of_whole = (json.loads((folder / "doratune.json").read_text()) for folder in folders)
    assert own["base_norms"] == of_whole["base_norms"] != {} and own["model"] == of_whole["model"]
    assert parts.keys() == whole.keys()
    for key in whole:
        assert (parts[key] - whole[key]).abs().max() <= 2**-22 * (name in SUMMED) * whole[key].abs().max(), key


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_no_process_holds_more_than_its_part_while_it_loads(found):
    """Nor until the first step: there its part, and as FSDP2 has it a block that computes, one that is fetched, one that arrives.
    Loaded whole it is all of the base, and a half more when that is divided."""
    (loaded, peak, size), (whole, whole_peak, _), said = found["memory_of_loading"]
    block = size / 12
    assert loaded < size / 2 + block / 2 and peak < size / 2 + 4 * block
    assert whole > 0.95 * size and whole_peak > 1.4 * size
    assert said == ["each process loads its own part of the base alone"] * 2


@pytest.mark.parametrize("into", ["sharded", "whole"])
def test_a_distributed_checkpoint_goes_on(found, into):
    """Saved by two processes, loaded over another start by two and by one: magnitudes are those of the file."""
    case = found["checkpoints_of_pytorch"]
    assert case[into] == pytest.approx(case["expected"], abs=1e-6)


def test_fsdp1_is_refused(found):
    """Without use_orig_params PyTorch itself refuses trained and frozen parameters in one unit."""
    message = found["other_engines"]["FSDP1, True"]
    assert message.startswith("UserError: FullyShardedDataParallel (FSDP1) flattens W, A, B and m of Linear")
    assert "fsdp_version: 2" in message and "\n" not in message
    assert "has both parameters with requires_grad=True and False" in found["other_engines"]["FSDP1, False"]


def test_tensor_parallel_layers_are_refused_and_others_train(found):
    message = found["other_engines"]["tensor parallel"]
    assert message.startswith("UserError: model.layers.0.mlp.gate_proj") and "attach, and shard with fully_shard" in message
    losses, expected = found["other_engines"]["beside them"]
    assert losses == pytest.approx(expected, abs=1e-5)


ZERO = ["lora", "dora", "dora, full gradient", "dvora", "head"]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", ["2", "3, all in parts"])
def test_deepspeed_through_accelerate(stage, tmp_path):
    """The losses are those of one process, and so is what is saved, verified and merged after them."""
    found = launched(tmp_path, stage, worker=WORKER.with_name("zero_worker.py"))[0]
    assert found["engine"] == ["DEEPSPEED", "DeepSpeedEngine", int(stage[0])]
    assert "load the model without deepspeed.zero.Init" in found["attached late"] or "parts" not in stage
    for method in ZERO:
        case = found[method]
        assert case["losses"][0] == pytest.approx(case["losses"][1], abs=1e-6), method
        assert max(case["saved"], case["merged state"]) < 2e-5, method
        assert stage == "2" or "doratune.merged_state_dict(model)" in case["merge"]
        assert case["verify"][0] == case["verify"][1] and case["inspect"][0] == case["inspect"][1]
