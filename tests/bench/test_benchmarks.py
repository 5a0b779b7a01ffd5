"""The measuring itself: interleaving, counting, arms that compute the same thing, JSON files and the report. Nothing is timed."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune
from doratune.bench import arms, clock, decode, memory, mixed, norm, startup, train_step
from doratune.bench.pages import write_report
from doratune.bench.settings import ARMS, MEASUREMENTS, BenchSettings
from doratune.bench.shapes import load, random_ids
from doratune.bench.train_step import CHECKPOINTED, PLAIN
from doratune.cli.main import main
from doratune.errors import UserError

CPU = torch.device("cpu")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SMALL = {"model": "tiny-shape", "dtypes": "bfloat16", "ranks": 4, "batch_size": 2, "length": 8, "rounds": 1, "warm_up": 0}
SMALL |= {"accumulation": 2, "new_tokens": 2, "tokens": 8, "layer_sizes": 16, "hidden_sizes": "8,16", "size_ranks": "2,4"}
SMALL |= {"norm_size": 40, "norm_rank": 3, "device": "cpu", "threads": "0,1"}
SMALL |= {"host_layers": 2, "host_width": 8, "host_tokens": 2, "host_rank": 2, "host_rounds": 2, "attach_layers": 2}
SMALL_FLAGS = [f"--{name}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def base():
    return load("tiny-shape", "float32", CPU)


def raising(error):
    def run(*_, **__):
        raise error

    return run


def test_order_turns_and_warm_up_is_dropped():
    order = []
    runs = {name: partial(order.append, name) for name in "abc"}
    series = clock.interleave(runs, rounds=3, warm_up=1, device=CPU, advance=lambda n: None)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert all(len(one.wall_s) == len(one.cpu_s) == 3 for one in series.values())


def test_out_of_memory_is_a_result_and_other_errors_are_not():
    runs = {"a": lambda: None, "b": raising(torch.OutOfMemoryError("no")), "c": clock.FAILED}
    summary = clock.summary(clock.interleave(runs, 2, 0, CPU), {"a/a": ("a", "a"), "b/a": ("b", "a"), "a/x": ("a", "x")})
    assert summary["arms"]["b"] == summary["arms"]["c"] == {"failed": "out of memory"}
    assert summary["arms"]["a"]["wall_s"] and list(summary["ratios"]) == ["a/a"]
    assert clock.attempt(lambda: torch.empty(10**15), CPU) is clock.FAILED
    with pytest.raises(RuntimeError, match="shape"):
        clock.interleave({"a": raising(RuntimeError("shape"))}, 1, 0, CPU)


def test_ratios_are_formed_within_rounds():
    series = {
        name: clock.Series(wall_s=times, cpu_s=[2 * t for t in times])
        for name, times in {"a": [2.0, 30.0, 6.0], "b": [1.0, 10.0, 3.0], "floor": [0.5, 5.0, 1.0]}.items()
    }
    assert clock.ratios(series, "a", "b")["wall_s"] == pytest.approx({"p20": 2.0, "p50": 2.0, "p80": 2.6})
    assert clock.ratios(series, "a", "b", "floor")["cpu_s"]["p50"] == pytest.approx(3.0)  # of 3, 5, 2.5
    assert clock.quantiles([]) is None


def test_arms_share_the_weights_and_move(base):
    ids, addresses = random_ids(base, 1, 8), {p.data_ptr() for p in base.parameters()}
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        for name in ARMS:
            model = arms.build(name, base, TARGETS, rank=4)
            frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
            assert frozen == addresses, name
            assert torch.equal(model(input_ids=ids).logits, expected) == (name == "frozen"), name
        assert torch.equal(base(input_ids=ids).logits, expected)


def plain_name(name: str) -> str:
    """PEFT's parameter names as ours."""
    name = name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "magnitude")
    return name.removesuffix(".weight").removesuffix(".default")


def test_three_doras_are_one(base):
    """dora, dora_peft and dora_dense with the same parameters: same loss, same gradients."""
    ids = random_ids(base, 2, 8)
    models = {name: arms.build(name, base, TARGETS, rank=4) for name in ("dora", "dora_peft", "dora_dense")}
    trained = {n: {plain_name(k): p for k, p in m.named_parameters() if p.requires_grad} for n, m in models.items()}
    for other in ("dora_peft", "dora_dense"):
        assert trained[other].keys() == trained["dora"].keys()
        for key, p in trained["dora"].items():
            trained[other][key].data.copy_(p.detach())
    losses = {name: train_step.TrainStep(model, ids).loss() for name, model in models.items()}
    for name, loss in losses.items():
        loss.backward()
        torch.testing.assert_close(loss, losses["dora"], rtol=1e-5, atol=0)
        for key, p in trained["dora"].items():
            assert (trained[name][key].grad - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-9, (name, key)


def test_merged_arm_leaves_the_shared_weights_alone(base):
    ids, before = random_ids(base, 1, 8), {k: v.clone() for k, v in base.state_dict().items()}
    merged, dora = (decode.decode_arm(name, base, TARGETS, 4).eval() for name in ("merged", "dora"))
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert all(type(m) is not type(dora.model.layers[0].self_attn.q_proj) for m in merged.modules())
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, dora(input_ids=ids).logits, rtol=1e-3, atol=1e-5)
    assert decode.decode(merged, ids, 5).shape == (1, 13)


def test_eight_adapters_compute_what_each_computes_alone(base):
    names = [f"n{i}" for i in range(mixed.ADAPTERS)]
    model, prompts = mixed.adapted(base, 4, TARGETS, names), random_ids(base, mixed.ADAPTERS, 5)
    with doratune.mixed(model, names) as way:
        together = decode.decode(model, prompts, 4)
        for i, name in enumerate(names):
            way.choose([name])
            assert torch.equal(decode.decode(model, prompts[i : i + 1], 4), together[i : i + 1])
    assert doratune.names(model) == [names[-1], *names[:-1]]


def test_a_product_keeps_its_two_factors():
    a, b = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    nothing = nn.Module()
    assert memory.saved_bytes(lambda: a * b, nothing) == 800
    assert memory.live_bytes(lambda: a * b) == 400
    assert memory.live_bytes(lambda: (a * b).exp()) == 400  # the product is not needed, exp keeps its own output
    assert memory.live_bytes(lambda: (a * b).sin()) == 800
    assert memory.saved_bytes(lambda: a.view(100) * a.view(100), nothing) == 400  # one storage
    assert memory.saved_bytes(lambda: (a * b).detach(), nothing) == 0
    assert memory.saved_bytes(lambda: (a * b).detach(), nothing, dropped_too=True) == 800
    model = nn.Module()
    model.a = nn.Parameter(a.detach())
    assert memory.saved_bytes(lambda: model.a * b, model) == 400
    with torch.no_grad():
        assert memory.peak_bytes(lambda: (a + 1).mul_(2).sum()) == 404
        assert memory.peak_bytes(lambda: (a + 1) * 2) == 800


class Hoarder(torch.autograd.Function):
    """Keeps a tensor on its context, past autograd's accounts."""

    @staticmethod
    def forward(ctx, x):
        ctx.twice = x * 2
        return x.sum()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.twice


def test_live_bytes_see_what_contexts_and_checkpoints_hold():
    a, nothing = torch.randn(10, 10, requires_grad=True), nn.Module()
    assert memory.saved_bytes(lambda: Hoarder.apply(a), nothing) == 0
    assert memory.live_bytes(lambda: Hoarder.apply(a)) == 404

    def forward():
        return checkpoint(lambda x: (x.sin() * x).sum(), a * 2, use_reentrant=False)

    assert memory.saved_bytes(forward, nothing) == 400
    assert memory.live_bytes(forward) == 404  # the checkpoint's input, and the sum


def test_ways_to_the_norm_agree():
    module = norm.large_layer(40, 3, CPU)
    for share in norm.SHARES:
        norm.scale_share(module, share)
        change = (module.scaling * module.lora_B @ module.lora_A).norm() / module.weight.float().norm()
        assert change.item() == pytest.approx(share, rel=1e-2)
        found = norm.errors(module, norm.ways(module, with_peft=True), share)
        assert found["doratune"] < 2e-4 and found["dense"] < 1e-2 and found["peft"] < 1e-5


def test_bench_measures_everything_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(startup, "TRIALS", 1)
    results = tmp_path / "results"
    assert main(["bench", *SMALL_FLAGS, "--output", str(results), "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    printed = json.loads(out[-1])
    assert set(printed) == {*MEASUREMENTS, "train_step_1_thread", "decode_1_thread", "mixed_1_thread"}
    assert any("dora/lora" in line for line in out)
    for what in MEASUREMENTS:
        content = json.loads((results / f"{what}_cpu.json").read_text())
        assert content["what"] == what and content["result"] == printed[what]
        assert content["facts"]["threads"] == (1 if what == "host" else torch.get_num_threads())
        assert content["facts"]["settings"]["ranks"] == [4] and content["facts"]["versions"]["torch"] == torch.__version__
    step = printed["train_step"]["bfloat16"]["4"]
    assert set(step[PLAIN]["ratios"]) == set(train_step.RATIOS) and set(step[CHECKPOINTED]["arms"]) == {"lora", "dora"}
    assert set(printed["decode"]["bfloat16"]["4"]["ratios"]) == set(decode.RATIOS)
    assert set(printed["mixed"]["bfloat16"]["4"]["ratios"]) == set(mixed.RATIOS)
    kept = printed["memory"]["bfloat16"]["4"]
    assert kept["checkpointing"]["arms"]["dora"]["live_bytes"] < kept["plain"]["arms"]["dora"]["live_bytes"]
    assert set(printed["norm"]["bfloat16"]["3"]["40"]["errors"]) == {"0.01", "0.1"}
    size = printed["sizes"]["bfloat16"]["4"]["16"]
    assert size["adapter_bytes"] == 4 * (2 * 4 * 16 + 16) and size["extra_bytes"] > 0
    report_of(results, tmp_path)


def report_of(results, root):
    (root / "docs").mkdir()
    (root / "docs" / "performance.md").write_text("old")
    page = write_report(root, results).read_text()
    assert "old\n" not in page and "bf16 r4" in page and "not measured" in page
    assert page.split("## GPU")[1].strip().startswith("not measured")
    assert "not measured" not in page.split("## CPU")[1].split("## GPU")[0]
    assert page.split("## llama-768-shape (CPU)")[1].count("not measured") == 3
    assert all(line.count("|") == table[0].count("|") for table in tables_of(page) for line in table)


def tables_of(page: str) -> list[list[str]]:
    blocks = (block.splitlines() for block in page.split("\n\n"))
    return [lines for lines in blocks if lines[0].startswith("|")]


def test_report_of_nothing_says_so(tmp_path):
    (tmp_path / "train_step_cpu.json").write_text("[")
    with pytest.raises(UserError, match="is not valid JSON"):
        write_report(tmp_path, tmp_path)
    assert not (tmp_path / "docs").exists()
    (tmp_path / "train_step_cpu.json").unlink()
    assert write_report(tmp_path, tmp_path).read_text().count("not measured") > 10


def test_an_arm_that_cannot_be_built_is_recorded(base, monkeypatch):
    def build(name, *rest):
        return raising(torch.OutOfMemoryError("no"))() if name == "dora" else arms.build(name, *rest)

    monkeypatch.setattr(train_step, "build", build)
    settings = BenchSettings(
        arms=["frozen", "lora", "dora"], ranks=[2], batch_size=1, length=8, rounds=1, warm_up=0, accumulation=1
    )
    plain = train_step.measure(base, settings, "float32")["2"][PLAIN]
    assert plain["arms"]["dora"] == {"failed": "out of memory"} and plain["arms"]["lora"]["cpu_s"]["p50"] > 0
    assert plain["ratios"] == {}


def test_a_model_that_does_not_fit_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("doratune.bench.shapes.shaped", raising(torch.OutOfMemoryError("CUDA out of memory")))
    assert main(["bench", *SMALL_FLAGS, "--what", "memory", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("doratune bench: tiny-shape does not fit") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--arms", "lora", "dorra"],
            "arms holds 'dorra'; expected one of frozen, lora, dora",
        ),
        (
            ["--what", "train_stp"],
            "what holds 'train_stp'; expected one of train_step, decode",
        ),
        (["--dtypes", "fp32"], "dtypes holds 'fp32'"),
        (["--ranks", "0"], "ranks holds 0"),
        (["--rounds", "0"], "rounds is 0"),
        (["--threads", "-1"], "threads holds -1"),
        (["--host_rounds", "0"], "host_rounds is 0"),
        (["--arms"], "--arms has no value"),
        (["--device", "tpu"], "device is 'tpu'; expected one of auto, cpu, cuda"),
        (["--kernel", "cutlass"], "kernel is 'cutlass'"),
        (["--targets", "wq", "--what", "memory"], "wq"),
        (["--ranks", "many"], "ranks"),
    ],
)
def test_mistakes_are_one_line(options, words, capsys, tmp_path):
    assert main(["bench", "--model", "tiny-shape", "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_cuda_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--arms", "lora", "dora"], ["--arms", "lora,dora"], ["--arms=lora,dora"], ["--arms", "[lora, dora]"]]
)
def test_lists_as_words_commas_or_yaml(words):
    from doratune.cli.arguments import parse

    settings, as_json = parse(BenchSettings, [*words, "--json", "--ranks", "4", "8", "--rounds", "2"], "bench", "")
    assert (settings.arms, settings.ranks, settings.rounds, as_json) == (["lora", "dora"], [4, 8], 2, True)
