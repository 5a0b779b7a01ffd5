"""ΔM and ΔD (§3.2): from factors and from dense weights, against the definition in float64."""

import grid
import pytest
import torch
from conftest import one_layer, randomize, tiny_llama
from torch import nn

import doratune
from doratune import AdapterConfig
from doratune.analysis import adapter_changes, model_changes, weight_change
from doratune.errors import UserError


def definition(W, V, axis, digits=60):
    """(|n − w|, 1 − cos) per vector, in decimal arithmetic of 60 digits."""
    from decimal import Decimal, getcontext

    getcontext().prec = digits
    W, V = (W, V) if axis == "output" else (W.T, V.T)
    pairs = []
    for w_row, v_row in zip(W.double().tolist(), V.double().tolist(), strict=True):
        w, v = [Decimal(x) for x in w_row], [Decimal(x) for x in v_row]
        dot, ww, vv = sum(a * b for a, b in zip(w, v, strict=True)), sum(a * a for a in w), sum(b * b for b in v)
        pairs.append((float(abs(vv.sqrt() - ww.sqrt())), float(1 - dot / (ww.sqrt() * vv.sqrt()))))
    return tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_dense_weights(axis, size):
    torch.manual_seed(0)
    W = torch.randn(11, 17)
    E = torch.randn(11, 17)
    V = W + size * E * W.norm() / E.norm()
    change = weight_change(W, V, axis)
    magnitudes, directions = definition(W, V, axis)
    torch.testing.assert_close(change.magnitudes, magnitudes, rtol=1e-7, atol=0)
    torch.testing.assert_close(change.directions, directions, rtol=1e-7, atol=0)
    assert change.magnitude == pytest.approx(magnitudes.mean().item(), rel=1e-7)
    assert change.direction == pytest.approx(directions.mean().item(), rel=1e-7)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("method", ["lora", "dora", "dvora", "dloha"])
@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_equal_the_dense_definition(axis, method, size, dtype):
    model, layer = one_layer(13, 10, dtype=dtype, method=method, magnitude_axis=axis)
    own = grid.move(layer)
    a = layer.adaptation
    with torch.no_grad():
        A, B = a.factors_of(layer)
        scale = size * layer.weight.float().norm() / (a.scaling * B @ A).norm()
        for name in ("lora_B", "vera_b", "hada_w2_a"):
            if name in own:
                own[name].mul_(scale)
        A, B = (t.double() for t in a.factors_of(layer))
    W = layer.weight.double()
    change = adapter_changes(model)["layer"]
    magnitudes, directions = definition(W, W + a.scaling * B @ A, axis)
    if a.magnitude:
        w = W.square().sum(1 if axis == "output" else 0).sqrt()
        magnitudes = (layer.magnitude.detach().double() - w).abs()
    torch.testing.assert_close(change.directions, directions, rtol=1e-6, atol=0)
    torch.testing.assert_close(change.magnitudes, magnitudes, rtol=1e-6, atol=0)


def test_scaling_turns_nothing_and_rotation_stretches_nothing():
    W = torch.randn(8, 6, dtype=torch.float64)
    for factor in (2.0, 0.5, 1.1, 1 + 1e-9, -1.0):
        change = weight_change(W, factor * W)
        assert change.direction == pytest.approx(2.0 if factor < 0 else 0.0, abs=1e-30 if factor > 0 else 1e-12)
        torch.testing.assert_close(change.relative_magnitudes, torch.full((8,), abs(abs(factor) - 1), dtype=torch.float64))
    assert weight_change(W, 2 * W).direction == 0.0
    W = W.mul(8).round()  # whole numbers: every sum is exact
    turned = torch.stack([W[:, 1], -W[:, 0], *W.T[2:]], 1)  # a quarter turn of the first two coordinates: exact in floating point
    assert weight_change(W, turned).magnitude == 0.0
    assert weight_change(W, turned).direction > 0.01
    assert weight_change(W, W).magnitude == weight_change(W, W).direction == 0.0


def test_rows_without_direction_do_not_count():
    W = torch.randn(6, 5)
    W[2] = 0.0
    V = W + 0.1
    assert len(weight_change(W, V).directions) == 5


def test_full_fine_tuning_and_merged_models():
    base, model = tiny_llama(), tiny_llama()
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    randomize(doratune.attach(model, AdapterConfig(rank=4, targets=names)))
    changes = adapter_changes(model)
    doratune.merge(model)
    dense = model_changes(base, model, names)
    for name in names:
        assert dense[name].direction == pytest.approx(changes[name].direction, rel=1e-4)
        assert dense[name].magnitude == pytest.approx(changes[name].magnitude, rel=1e-3)


def test_mistakes_are_one_line():
    W = torch.randn(4, 3)
    for before, after, message in (
        (W, torch.randn(3, 4), "shapes"),
        (W, W * float("nan"), "NaN"),
        (W[0], W[0], "expected two of one shape"),
    ):
        with pytest.raises(UserError, match=message):
            weight_change(before, after)
    with pytest.raises(UserError, match="magnitude_axis is 'rows'"):
        weight_change(W, W, "rows")
    with pytest.raises(UserError, match="has no attribute"):
        model_changes(nn.Linear(2, 2), tiny_llama(), ["lm_head"])


def test_the_spectrum_is_the_updates():
    from doratune.analysis.spectrum import effective_rank, update_spectrum

    _, layer = one_layer(13, 10, rank=4)
    assert effective_rank(update_spectrum(layer)) == 0.0
    grid.move(layer)
    exact = torch.linalg.svdvals((layer.scaling * layer.lora_B @ layer.lora_A).double())[:4]
    torch.testing.assert_close(update_spectrum(layer), exact, rtol=1e-6, atol=1e-9)
    assert effective_rank(torch.ones(5)) == pytest.approx(5.0)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1.0)


def test_the_share_of_a_gradient_that_changes_magnitudes():
    from doratune.analysis.gradients import magnitude_share

    W = torch.randn(6, 9)
    assert magnitude_share(W, 3 * W) == pytest.approx(1.0)
    G = torch.randn(6, 9)
    G -= (G * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
    assert magnitude_share(W, G) == pytest.approx(0.0, abs=1e-12)
    assert magnitude_share(W.T, 3 * W.T, "input") == pytest.approx(1.0)
    with pytest.raises(UserError, match="gradient is 0"):
        magnitude_share(W, torch.zeros_like(W))


def test_regression_of_known_points():
    from doratune.analysis.points import Point, regression

    points = [Point("", 0, "", 0, 3.0 - 2.0 * x, x) for x in (0.0, 1.0, 4.0)]
    line = regression(points)
    assert (line.slope, line.intercept, line.correlation) == pytest.approx((-2.0, 3.0, -1.0))
    with pytest.raises(UserError, match="without enough spread"):
        regression(points[:2])


def run_of(folder, method, tiny_folder, steps=(2, 4)):
    """A run's folder with checkpoints, as doratune train leaves it."""
    model = doratune.attach(tiny_llama(), AdapterConfig(method=method, rank=4))
    model.config._name_or_path = str(tiny_folder)
    for number, step in enumerate(steps):
        randomize(model, seed=step, scale=0.05 * (number + 1))
        doratune.save(model, folder / f"checkpoint-{step}")
    doratune.save(model, folder / "adapter")
    return folder


def test_analyze_from_the_command_line(tiny_folder, tmp_path, capsys):
    import json

    from doratune.cli.main import main

    runs = [str(run_of(tmp_path / method, method, tiny_folder)) for method in ("dora", "lora")]
    merged = doratune.load(tiny_llama(), tmp_path / "dora" / "adapter")
    doratune.merge(merged)
    merged.save_pretrained(tmp_path / "full")
    arguments = [
        "analyze",
        "--runs",
        *runs,
        str(tmp_path / "full"),
        "--modules",
        "q_proj",
        "v_proj",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    dora, lora, full = (result[run]["points"] for run in (*runs, str(tmp_path / "full")))
    assert [len(dora), len(lora), len(full)] == [8, 8, 4]  # two checkpoints (the last is the adapter), two layers, two modules
    assert {p["step"] for p in dora} == {2, 4} and {p["layer"] for p in dora} == {0, 1}
    last = {p["name"]: p for p in dora if p["step"] == 4}
    for p in full:  # the merged model is the last adapter
        assert p["direction"] == pytest.approx(last[p["name"]]["direction"], rel=1e-3)
        assert p["magnitude"] == pytest.approx(last[p["name"]]["magnitude"], rel=1e-2)
    assert -1 <= result[runs[0]]["line"]["correlation"] <= 1
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"points.json", "scatter.png", "layers.png"}
    assert (tmp_path / "out" / "scatter.png").read_bytes()[:4] == b"\x89PNG"
    assert main([*arguments, "--format", "svg", "--overwrite"]) == 0
    assert "<svg" in (tmp_path / "out" / "scatter.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs is not set"),
        (["--runs", "nowhere"], "holds no adapter"),
        (["--runs", "A", "A"], "twice"),
        (["--runs", "A", "--modules", "qproj"], "no weight is named qproj"),
    ],
)
def test_analyze_mistakes_are_one_line(arguments, message, tiny_folder, tmp_path, capsys):
    from doratune.cli.main import main

    run = run_of(tmp_path / "run", "dora", tiny_folder)
    assert main(["analyze", *(str(run) if a == "A" else a for a in arguments), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_words_without_a_flag_are_runs():
    from doratune.cli.analyze import AnalyzeSettings
    from doratune.cli.arguments import parse

    def runs_of(*argv):
        settings, _ = parse(AnalyzeSettings, list(argv), "analyze", "", words="runs")
        return settings.runs, settings.output, settings.overwrite, settings.modules

    assert runs_of("a", "b: [c", "1") == (["a", "b: [c", "1"], "runs/analysis", False, [])
    assert runs_of("--output", "o", "a", "--overwrite", "b") == (["a", "b"], "o", True, [])
    assert runs_of("a", "--modules", "q_proj", "v_proj", "--runs", "b") == (
        ["a", "b"],
        "runs/analysis",
        False,
        ["q_proj", "v_proj"],
    )
    assert runs_of("--overwrite", "false", "--output=o", "a") == (["a"], "o", False, [])
