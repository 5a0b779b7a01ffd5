"""The conditions that figures are taken under: threads, allocator, the measured model, and files by these."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import doratune
from doratune.bench import allocator, arms, clock, measure, record
from doratune.bench.settings import BenchSettings
from doratune.bench.shapes import load, shaped
from doratune.errors import UserError

CPU = torch.device("cpu")
TINY = {"model": "tiny-shape", "targets": ["q_proj"], "dtypes": ["float32"], "ranks": [2], "batch_size": 1, "length": 4}
TINY |= {"rounds": 1, "warm_up": 0, "accumulation": 1, "new_tokens": 1, "arms": ["lora", "dora"], "device": "cpu"}


def test_threads_are_set_inside_the_block_only():
    before = torch.get_num_threads()
    with clock.thread_count(3):
        assert torch.get_num_threads() == 3
        with clock.thread_count(0):
            assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError), clock.thread_count(3):
        raise ValueError
    assert torch.get_num_threads() == before


def test_each_number_of_threads_has_a_file_of_its_own(tmp_path, monkeypatch):
    seen, run = [], measure.OF_A_MODEL["train_step"]

    def spied(*given):
        seen.append(torch.get_num_threads())
        return run(*given)

    monkeypatch.setitem(measure.OF_A_MODEL, "train_step", spied)
    settings = BenchSettings(what=["train_step", "memory"], threads=[1, 2], output=str(tmp_path), **TINY)
    results = measure.run_all(settings, lambda line: None)
    assert seen == [1, 2]
    assert set(results) == {"train_step_1_thread", "train_step_2_threads", "memory"}  # bytes are counted: once
    assert {p.name for p in tmp_path.iterdir()} == {
        "train_step_cpu_1_thread.json",
        "train_step_cpu_2_threads.json",
        "memory_cpu.json",
    }
    content = json.loads((tmp_path / "train_step_cpu_1_thread.json").read_text())
    assert content["facts"]["threads"] == 1 and content["what"] == "train_step"
    assert content["result"] == results["train_step_1_thread"]


def test_files_by_storage_and_shape(tmp_path):
    assert record.variant(BenchSettings()) == record.variant(BenchSettings(model="tiny-shape")) == ""
    assert record.variant(BenchSettings(quantize="nf4")) == "nf4"
    assert record.variant(BenchSettings(model="llama-768-shape")) == "llama-768-shape"
    facts = {"device_type": "cpu"}
    assert record.write(tmp_path, "decode", facts, {}, "llama-768-shape", 1).name == "decode_cpu_llama-768-shape_1_thread.json"
    assert record.write(tmp_path, "train_step", facts, {}, "nf4").name == "train_step_cpu_nf4.json"


def test_ratio_lines_show_the_clock_of_their_threads():
    times = {clock: {"p20": p, "p50": p, "p80": p} for clock, p in (("wall_s", 1.5), ("cpu_s", 2.5))}
    one = {"float32": {"4": {"ratios": {"dora/lora": times}}}}
    lines = measure.ratio_lines({"decode": one, "decode_1_thread": one, "host": {"b": {"ratios": {"a/b": {"forward_min": 0.5}}}}})
    assert "1.500 (1.500 to 1.500)" in lines[0] and "2.500 (2.500 to 2.500)" in lines[1]
    assert lines[2].endswith("forward_min 0.500")


ALLOCATOR = """
import torch
from torch import nn
from doratune.bench import allocator, arms, norm
base = nn.Sequential()
base.add_module("layer", nn.Linear(4, 4, bias=False))
print(allocator.hold_still.cache_info().currsize)
{build}
print(allocator.hold_still.cache_info().currsize)
"""


@pytest.mark.parametrize(
    "build",
    [
        "arms.build('frozen', base, ['layer'], 2)",
        "arms.attach_arm('lora', base, ['layer'], 2)",
        "from doratune.bench.settings import BenchSettings\n"
        "norm.measure(BenchSettings(arms=['dora'], norm_size=8, norm_rank=2, rounds=1, warm_up=0, device='cpu'))",
    ],
)
def test_the_allocator_is_held_still_before_an_arm_is_built(build):
    code = ALLOCATOR.format(build=build)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", "1"]


def test_nothing_that_is_freed_goes_back_to_the_system():
    if not allocator.hold_still():
        pytest.skip("the C library has no mallopt")
    code = """
import resource, torch
from doratune.bench.allocator import hold_still
hold_still()
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**25).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *later = (int(word) for word in run.stdout.split())
    # up to 7 times (a bin of glibc's thread cache) a freed block has lost what aligns it, and is too small for the next one
    assert max(later[9:]) < first / 10


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch):
    def no_library(_):
        raise OSError

    monkeypatch.setattr(allocator.ctypes, "CDLL", no_library)
    assert allocator.hold_still.__wrapped__() is False


def test_the_shape_of_768():
    model = shaped("llama-768-shape", "bfloat16", torch.device("meta"))
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert len(linear) == 6 * 7 + 1
    assert model.model.layers[0].mlp.up_proj.weight.shape == (2048, 768)
    assert model.model.layers[5].self_attn.k_proj.weight.shape == (768, 768)
    head, layers = model.lm_head.weight.numel(), sum(m.weight.numel() for m in linear.values())
    assert head / layers < 0.1


def test_all_linear_means_the_same_to_every_arm():
    base = load("tiny-shape", "float32", CPU)
    expected = sorted(name for name, m in base.named_modules() if isinstance(m, nn.Linear) and name != "lm_head")
    for name in ("lora", "dora"):
        assert sorted(n for n, _ in doratune.adapters(arms.build(name, base, ["all-linear"], 2))) == expected
    peft = arms.build("lora_peft", base, ["all-linear"], 2)
    found = {
        n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")
    }
    assert sorted(found) == expected
    dense = arms.build("dora_dense", base, ["all-linear"], 2)
    assert sorted(n for n, m in dense.named_modules() if isinstance(m, arms.DenseDoRALinear)) == expected


def test_targets_are_checked_before_anything_is_measured():
    base = load("tiny-shape", "float32", CPU)
    measure.check_targets(base, ["all-linear"])
    measure.check_targets(base, ["q_proj"])
    with pytest.raises(UserError, match="wq"):
        measure.check_targets(base, ["wq"])
    assert not list(doratune.adapters(base))
