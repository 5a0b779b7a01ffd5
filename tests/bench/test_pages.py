"""What is promised, in words, and the pages from results that are complete, partial or absent."""

import json

import pytest

from doratune.bench.pages import performance_page, read_results, write_report
from doratune.bench.settings import BenchSettings
from doratune.bench.targets import HOST_TARGETS, OTHER_TARGETS, TARGETS, promise, targets

FACTS = {"date": "2026-01-01", "device": "a processor", "device_type": "cpu", "threads": 1, "versions": {}, "commit": "abc"}
FACTS |= {"settings": {k: v for k, v in vars(BenchSettings()).items() if k != "output"}}


def ratio(wall: float, cpu: float) -> dict:
    return {name: {"p20": p, "p50": p, "p80": p} for name, p in (("wall_s", wall), ("cpu_s", cpu))}


def step(wall: float, cpu: float, dtype="bfloat16", rank="16", name="dora/lora") -> dict:
    arms = {arm: ratio(1.0, 2.0) for arm in ("lora", "dora")}
    return {"facts": FACTS, "result": {dtype: {rank: {"plain": {"arms": arms, "ratios": {name: ratio(wall, cpu)}}}}}}


def host(forward=0.7, operations=5, reads=1) -> dict:
    times = {part: {"min": 10.0, "p50": 12.5} for part in ("forward", "backward", "decode")}
    counted = {"a_layer": operations + 0.5, "in_the_call": operations, "host_reads": reads, "names": {}}
    ratios = {f"{part}_{kind}": forward for part in times for kind in ("min", "p50")}
    one = {
        "arms": {"dora": times},
        "ratios": {"dora/dora_peft": ratios},
        "operations": {"dora": dict.fromkeys(("forward preparing", "forward", "backward", "decode"), counted)},
        "host_reads": {"dora": {"a_model_forward": reads, "a_layer": reads // 24}},
        "attach_s": {"dora": 0.125},
        "import_s": {"import": 0.001, "first use": 0.08},
    }
    return {"facts": FACTS, "result": {"bfloat16": {"8": one}}}


def words() -> dict[str, str]:
    return {target.label: target.words for target in (*TARGETS, *OTHER_TARGETS, *HOST_TARGETS)}


def test_promises_in_words():
    said = words()
    assert said["step, DoRA / LoRA"] == "≤ 1.05 r16, ≤ 1.07 r64"
    assert said["llama-768-shape: step, DoRA / LoRA"] == "≤ 1.05 r24"
    assert said["step, DoRA / PEFT's LoRA"] == said["llama-768-shape: step, DoRA / PEFT's LoRA"] == "≤ 1.02 fp32, ≤ 0.95 bf16"
    assert said["step, accumulation + checkpointing, DoRA / LoRA"] == said["unmerged decode, DoRA / LoRA"] == "≤ 1.03"
    assert said["nf4: step, QDoRA / QLoRA"] == "≤ 1.05"
    assert said["forward, DoRA / PEFT's DoRA"] == said["decode, DoRA / PEFT's LoRA"] == "≤ 0.8"
    assert said["backward, DoRA / PEFT's DoRA"] == "≤ 1.1"
    parts = ("forward", "backward", "decode")
    limits = [said[f"operations in a layer's {part}, {arm}"] for arm in ("DoRA", "LoRA") for part in parts]
    assert limits == ["≤ 5", "≤ 11", "≤ 4", "≤ 3", "≤ 8", "≤ 3"]
    assert said["host reads of a DoRA layer's forward"] == "≤ 0" and said["host reads of a DoRA model's forward"] == "≤ 1"


@pytest.mark.parametrize(
    ("results", "shown"),
    [
        ({"train_step": step(1.04, 9.0), "train_step_1_thread": step(9.0, 1.06)}, "1.040 wall, **1.060** CPU (missed)"),
        ({"train_step": step(1.06, 9.0)}, "**1.060** wall (missed)"),
        ({"train_step_1_thread": step(9.0, 1.04)}, "1.040 CPU"),
        ({}, "not measured"),
    ],
)
def test_a_step_is_wall_time_and_one_threads_cpu_time(results, shown):
    assert promise(TARGETS[0], results, "cpu", "bfloat16", "16") == shown
    assert f"| step, DoRA / LoRA | ≤ 1.05 r16, ≤ 1.07 r64 | {shown} | not measured |" in targets(results, {})
    assert shown.split()[0] in performance_page(results, {})


def test_other_bases_and_sizes_have_rows_and_sections():
    results = {"train_step_nf4": step(1.01, 9.0), "train_step_llama-768-shape_1_thread": step(9.0, 1.09, rank="24")}
    table = targets(results, {})
    assert "| nf4: step, QDoRA / QLoRA | ≤ 1.05 | bf16 r16 1.010 wall | not measured |" in table
    assert "| llama-768-shape: step, DoRA / LoRA | ≤ 1.05 r24 | bf16 r24 **1.090** CPU (missed) | not measured |" in table
    page = performance_page(results, {})
    section = page.split("## llama-768-shape (CPU)")[1].split("## Base in nf4")[0]
    assert "| dora/lora | ≤ 1.05 | not measured | 1.090 (1.090 to 1.090) |" in section
    assert "Unmerged decode\n\nnot measured" in section
    assert "| dora/lora | ≤ 1.05 | 1.010 (1.010 to 1.010) | not measured |" in page.split("## Base in nf4 (CPU)")[1]
    assert "llama-768-shape (CUDA)" not in page and "Base in nf4" not in performance_page({}, {})


def test_host_results_on_the_pages():
    results = {"host": host()}
    table = targets(results, {})
    assert "| forward, DoRA / PEFT's DoRA | ≤ 0.8 | bf16 r8 0.700 | not measured |" in table
    assert "| decode, DoRA / PEFT's LoRA | ≤ 0.8 | not measured | not measured |" in table  # the arm was left out
    assert "| operations in a layer's forward, DoRA | ≤ 5 | bf16 r8 5 | not measured |" in table
    assert "| operations in a layer's decode, DoRA | ≤ 4 | bf16 r8 **5** (missed) | not measured |" in table
    assert "| host reads of a DoRA layer's forward | ≤ 0 | bf16 r8 0 | not measured |" in table
    assert "64 × 64, bf16, rank 8, 4 tokens, one thread" in table
    section = performance_page(results, {}).split("### Host cost")[1].split("## GPU")[0]
    assert "24 layers of 64 × 64, 4 tokens, 250 rounds" in section
    assert "| dora | 10.0 (12.5) | 10.0 (12.5) | 10.0 (12.5) |" in section
    assert "| forward, dora/dora_peft | ≤ 0.8 | 0.700 | 0.700 |" in section
    assert "| dora | 5.5 (5) | 5.5 (5) | 5.5 (5) | 5.5 (5) | 1 | 1 |" in section
    assert "Attaching to 200 such layers: dora 0.125 s" in section
    missed = targets({"host": host(forward=1.2, reads=24)}, {})
    assert "≤ 0 | bf16 r8 **1** (missed)" in missed and "≤ 0.8 | bf16 r8 **1.200** (missed)" in missed


def test_pages_without_host_results():
    results = {"train_step": step(1.0, 1.0)}
    assert "(not measured):" in targets(results, {}) and "### Host cost\n\nnot measured" in performance_page(results, {})


def test_files_are_read_by_measurement_variant_and_threads(tmp_path):
    for name in (
        "train_step_cpu",
        "train_step_cpu_nf4_1_thread",
        "decode_cpu_llama-768-shape",
        "host_cuda",
        "train_step_cpu_2_threads",
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(step(1.0, 1.0)))
    assert set(read_results(tmp_path, "cpu")) == {"train_step", "train_step_nf4_1_thread", "decode_llama-768-shape"}
    assert set(read_results(tmp_path, "cuda")) == {"host"}


def test_written_from_partial_results(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "host_cpu.json").write_text(json.dumps(host()))
    page = write_report(tmp_path, tmp_path / "results").read_text()
    assert "### Host cost" in page and "bf16 r8 5 |" in page.partition("## CPU")[0]
