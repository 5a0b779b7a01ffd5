"""Host cost: what is timed and counted, on a tiny model and in few rounds. No time is judged."""

import pytest
import torch
from torch import nn

from doratune.bench import host, startup
from doratune.bench.settings import BenchSettings

CPU = torch.device("cpu")
ARMS = ["frozen", "lora", "dora", "lora_peft", "dora_peft"]
SMALL = {"host_layers": 3, "host_width": 8, "host_tokens": 2, "host_rank": 2, "host_rounds": 2, "warm_up": 1, "attach_layers": 2}


@pytest.fixture(scope="module")
def measured():
    settings = BenchSettings(what=["host"], device="cpu", **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "TRIALS", 1)
        return host.measure(settings)["bfloat16"]["2"]


def test_every_arm_is_timed_and_counted(measured):
    assert list(measured["arms"]) == list(measured["operations"]) == list(measured["host_reads"]) == ARMS
    for times in measured["arms"].values():
        assert list(times) == ["forward", "backward", "decode"]
        assert all(0 < one["min"] <= one["p50"] for one in times.values())
    assert set(measured["ratios"]) == set(host.RATIOS)
    assert set(measured["ratios"]["dora/dora_peft"]) == {f"{part}_{kind}" for part in host.TIMED for kind in ("min", "p50")}
    assert set(measured["attach_s"]) == set(ARMS[1:]) and set(measured["import_s"]) == {"import", "first use"}
    assert all(seconds > 0 for seconds in (*measured["attach_s"].values(), *measured["import_s"].values()))


def test_counts_of_arms_whose_code_is_not_ours(measured):
    frozen, peft = measured["operations"]["frozen"], measured["operations"]["lora_peft"]
    assert all(part == {"a_layer": 1.0, "in_the_call": 1, "host_reads": 0, "names": {"mm": 3}} for part in frozen.values())
    assert peft["decode"]["names"]["mm"] == 9 and peft["decode"]["a_layer"] > 3
    assert peft["forward preparing"] == peft["forward"]  # PEFT prepares nothing
    assert measured["host_reads"]["lora_peft"] == {"a_model_forward": 0, "a_layer": 0}


def test_what_the_model_does_once_a_forward_is_told_from_a_layers_call(measured):
    for arm, limits in (("dora", (4, 11, 4)), ("lora", (3, 8, 3))):
        counted = measured["operations"][arm]
        own = [counted[part]["in_the_call"] for part in ("forward", "backward", "decode")]
        assert all(0 < ours <= limit for ours, limit in zip(own, limits, strict=True)), own
        assert counted["forward preparing"]["a_layer"] > counted["forward preparing"]["in_the_call"]
    peft = measured["operations"]["dora_peft"]["forward"]
    assert peft["in_the_call"] == peft["a_layer"]  # nothing stands above PEFT's layers


def test_every_round_steps_before_the_forward_and_decodes_twice():
    events = []

    class Layer(nn.Linear):
        def forward(self, x):
            events.append(("train" if self.training else "eval", torch.is_grad_enabled(), self.weight.detach().clone()))
            return super().forward(x)

    arm = host.HostArm(nn.Sequential(Layer(4, 4)), 4, 2, torch.float32, CPU)
    taken = host.rounds({"a": arm}, 2, 1, 1, CPU, lambda n: None)
    assert [event[:2] for event in events] == [("train", True)] + 3 * [("train", True), ("eval", False), ("eval", False)]
    weights = [event[2] for event in events]
    assert not any(torch.equal(weights[i - 1], weights[i]) for i in (1, 4, 7))
    assert all(torch.equal(weights[i], weights[i + 2]) for i in (1, 4, 7))
    assert {part: len(times) for part, times in taken["a"].items()} == dict.fromkeys(host.TIMED, 2)


def test_reads_that_every_layer_makes_are_told_from_the_models_own():
    reads = {"forward preparing": {"host_reads": 1}, "forward": {"host_reads": 0}}
    assert host._reads(reads, 24) == {"a_model_forward": 1, "a_layer": 0}
    reads["forward"]["host_reads"] = 49
    assert host._reads(reads, 24) == {"a_model_forward": 49, "a_layer": 2}


def test_ratios_are_of_least_times_and_within_rounds():
    over = {part: [2.0, 30.0, 6.0] for part in host.TIMED}
    under = {part: [1.0, 10.0, 3.0] for part in host.TIMED}
    assert host._ratio(over, under)["decode_min"] == 2.0 and host._ratio(over, under)["decode_p50"] == pytest.approx(2.0)


def test_outputs_keep_the_size_of_the_input():
    model = host.small_layers(24, 64, torch.float32, CPU)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    assert 0.2 < model(x).std().item() < 5
    assert host.names(model) == [f"layer{n}" for n in range(24)]
