"""ΔM and ΔD (§3.2): from factors and from dense weights, against the definition in float64."""

import grid
import pytest
import torch
from conftest import one_layer, randomize, tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

import doratune
from doratune import AdapterConfig
from doratune.analysis import adapter_changes, gradient_shares, magnitude_share, model_changes, weight_change
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
    a = layer.adapted
    with torch.no_grad():
        A, B = a.low_rank()
        scale = size * layer.weight.float().norm() / (a.scaling * B @ A).norm()
        for name in ("lora_B", "vera_b", "hada_w2_a"):
            if name in own:
                own[name].mul_(scale)
        A, B = (t.double() for t in a.low_rank())
    W = layer.weight.double()
    change = adapter_changes(model)["layer"]
    magnitudes, directions = definition(W, W + a.scaling * B @ A, axis)
    if a.magnitude:
        w = W.square().sum(1 if axis == "output" else 0).sqrt()
        magnitudes = (layer.magnitude.detach().double() - w).abs()
    torch.testing.assert_close(change.directions, directions, rtol=1e-6, atol=0)
    torch.testing.assert_close(change.magnitudes, magnitudes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_a_small_turn_is_lost_in_the_cosine_and_not_here(size):
    """1 − cos of fp32 weights by the cosine, in fp32, is off by more than its own size; from the factors it is right to 1e-6."""
    model, layer = one_layer(64, 256, rank=4)
    grid.move(layer)
    with torch.no_grad():
        layer.lora_B.mul_(size * layer.weight.norm() / (layer.scaling * layer.lora_B @ layer.lora_A).norm())
        V = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
        exact_V = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    _, exact = definition(layer.weight, exact_V, "output")
    naive = (1 - torch.nn.functional.cosine_similarity(V, layer.weight.detach(), dim=1)).double()
    wrong = ((naive - exact).abs() / exact).max().item()
    assert wrong > (1.0 if size == 1e-4 else 0.01)
    torch.testing.assert_close(adapter_changes(model)["layer"].directions, exact, rtol=1e-6, atol=0)


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
    W = torch.randn(6, 9)
    assert magnitude_share(W, 3 * W) == pytest.approx(1.0)
    G = torch.randn(6, 9)
    G -= (G * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
    assert magnitude_share(W, G) == pytest.approx(0.0, abs=1e-12)
    assert magnitude_share(W.T, 3 * W.T, "input") == pytest.approx(1.0)
    with pytest.raises(UserError, match="gradient is 0"):
        magnitude_share(W, torch.zeros_like(W))


def test_transposed_weights_of_full_models():
    """GPT-2 stores (I, O): rows of W are its columns, for a dense difference as for an adapter."""
    base, model = tiny_gpt2(), tiny_gpt2()
    name = "transformer.h.0.attn.c_attn"
    randomize(doratune.attach(model, AdapterConfig(rank=4, targets=[name])))
    change = adapter_changes(model)[name]
    doratune.merge(model)
    dense = model_changes(base, model, [name])[name]
    assert len(dense.directions) == 96
    torch.testing.assert_close(dense.directions, change.directions, rtol=1e-4, atol=1e-9)


def test_the_spectrum_of_a_dense_difference_is_the_adapters():
    from doratune.analysis import difference_spectrum, update_spectrum
    from doratune.analysis.spectrum import LARGEST, summarized

    model, layer = one_layer(13, 10, rank=4, method="lora")
    grid.move(layer)
    W, own = layer.weight.detach().clone(), update_spectrum(layer)
    doratune.merge(model)
    values = difference_spectrum(W, model.layer.weight)
    torch.testing.assert_close(values[:4].double(), own, rtol=1e-4, atol=0)
    assert values[4:].max() < 1e-5 * values[0]
    short = summarized(torch.ones(LARGEST + 44), 2.0)
    assert len(short.values) == LARGEST and short.effective_rank == pytest.approx(LARGEST + 44)  # all of them count


# ---- gradients (§4.2)


def parts_of(W, G):
    """Definition: share of Σ|G|² along the rows of W."""
    v = W / W.norm(dim=1, keepdim=True)
    return ((G * v).sum(1).square().sum() / G.square().sum()).item()


def dense_gradient(model, name, batch):
    parameter = dict(model.named_parameters())[f"{name}.weight"]
    for p in model.parameters():
        p.requires_grad_(p is parameter)
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return parameter.detach().double(), parameter.grad.double()


def a_batch():
    ids = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def test_shares_of_a_real_backward_pass():
    model, batch = tiny_llama(), a_batch()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.weight.grad = kept = torch.ones_like(model.lm_head.weight)
    shares = gradient_shares(model, batch, ["q_proj", "model.layers.1.mlp.down_proj"])
    assert list(shares) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert model.lm_head.weight.grad is kept and all(p.grad is None for n, p in model.named_parameters() if n != "lm_head.weight")
    for name, share in shares.items():
        W, G = dense_gradient(model, name, batch)
        assert share == pytest.approx(parts_of(W, G), rel=1e-5)
        columns = gradient_shares(model, batch, [name], "input")[name]
        assert columns == pytest.approx(parts_of(W.T, G.T), rel=1e-5)
    everything = gradient_shares(model, lambda m: m(**batch).loss)
    assert len(everything) == 2 * 7 + 2 and everything["model.layers.1.mlp.down_proj"] == pytest.approx(share)


def test_shares_of_an_adapted_model_are_those_of_its_merged_weights():
    model, batch = tiny_llama(), a_batch()
    randomize(doratune.attach(model, AdapterConfig(rank=4, targets=["q_proj", "down_proj"])))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    shares = gradient_shares(model, batch)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert set(shares) == {name for name, _ in doratune.adapters(model)}
    doratune.merge(model)
    for name, share in shares.items():
        assert share == pytest.approx(parts_of(*dense_gradient(model, name, batch)), rel=1e-5)


def test_transposed_and_tied_weights():
    model, batch = tiny_gpt2(), a_batch()
    name = "transformer.h.1.mlp.c_fc"
    W, G = dense_gradient(model, name, batch)
    assert gradient_shares(model, batch, ["c_fc"])[name] == pytest.approx(parts_of(W.T, G.T), rel=1e-5)
    assert set(gradient_shares(model, batch, ["wte", "lm_head"])) == {"transformer.wte"}


def test_one_gradient_at_a_time(monkeypatch):
    """When a layer's gradient is reduced, none of another layer is kept."""
    from doratune.analysis import gradients

    model, held = tiny_llama(), []
    reduced = gradients._energies

    def counted(*arguments):
        held.append(sum(p.grad is not None for p in model.parameters()))
        return reduced(*arguments)

    monkeypatch.setattr(gradients, "_energies", counted)
    gradient_shares(model, a_batch())
    assert held == [0] * 16  # the reduced one has been taken off its parameter, too


def test_gradient_mistakes_are_one_line():
    model, batch = tiny_llama(), a_batch()
    with pytest.raises(UserError, match="no layer with a dense weight is named qproj"):
        gradient_shares(model, batch, ["qproj"])
    with pytest.raises(UserError, match="the loss is no finite number"):
        gradient_shares(model, lambda m: torch.zeros(()))
    with pytest.raises(UserError, match="the loss is no finite number"):
        gradient_shares(model, {"input_ids": batch["input_ids"]})
    assert all(p.requires_grad for p in model.parameters())


def test_doras_gradient_by_the_direction_stretches_nothing():
    """Eq. 6: by V it is m/n·(I − v·vᵀ)·G. With A the unit matrix and s = 1, B's gradient is the one by V."""
    shares = {}
    for method, norm_gradient in (("lora", "detached"), ("dora", "detached"), ("dora", "full")):
        model, layer = one_layer(13, 10, method=method, rank=10, alpha=10, norm_gradient=norm_gradient, bias=False)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            layer.lora_A.copy_(torch.eye(10))
            layer.lora_B.copy_(0.1 * torch.randn(13, 10, generator=generator))
        x, target = torch.randn(7, 10, generator=generator), torch.randn(7, 13, generator=generator)
        (model(x) - target).square().sum().backward()
        V = layer.weight + layer.lora_B
        shares[method, norm_gradient] = magnitude_share(V.detach(), layer.lora_B.grad)
    assert shares["dora", "full"] < 1e-12
    assert shares["lora", "detached"] > 0.01 and shares["dora", "detached"] > 0.01


def test_regression_of_known_points():
    from doratune.analysis.points import Point, regression

    points = [Point("", 0, "", 0, 3.0 - 2.0 * x, x) for x in (0.0, 1.0, 4.0)]
    line = regression(points)
    assert (line.slope, line.intercept, line.correlation) == pytest.approx((-2.0, 3.0, -1.0))
    assert line.interval is None  # of one weight
    with pytest.raises(UserError, match="without enough spread"):
        regression(points[:2])


def test_the_interval_of_a_correlation_is_over_weights():
    """Checkpoints of a weight are no new evidence; as many weights again are."""
    from doratune.analysis.points import Point, regression

    def correlation(weights, copies=1):
        x = torch.randn(weights, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        x[:, 1] = 0.6 * x[:, 0] + 0.8 * x[:, 1]
        return regression([Point(f"w{i}", 0, "", step, *pair) for step in range(copies) for i, pair in enumerate(x.tolist())])

    line, twice, more = correlation(40), correlation(40, copies=2), correlation(400)
    assert line.interval[0] < line.correlation < line.interval[1]
    assert twice.interval == pytest.approx(line.interval)
    fisher = 2 * 1.96 / 397**0.5 * (1 - more.correlation**2)  # of 400 independent pairs
    assert more.interval[1] - more.interval[0] == pytest.approx(fisher, rel=0.15)


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
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        ".doratune",
        "points.json",
        "scatter.png",
        "layers.png",
        "spectrum.png",
    }
    assert (tmp_path / "out" / "scatter.png").read_bytes()[:4] == b"\x89PNG"
    assert main([*arguments, "--format", "svg", "--overwrite"]) == 0
    assert "<svg" in (tmp_path / "out" / "scatter.svg").read_text()


def analyzed(*arguments, output):
    """(exit status, points.json)."""
    import json

    from doratune.cli.main import main

    status = main(["analyze", *map(str, arguments), "--output", str(output)])
    return status, json.loads((output / "points.json").read_text()) if status == 0 else None


@pytest.mark.parametrize("changed", [1, 2, 0])
def test_weights_that_a_run_left_alone_are_not_counted(changed, tiny_folder, tmp_path, capsys):
    """A frozen tower's, say; where nothing at all has changed, that is what is said."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        for layer in model.model.layers[:changed]:
            layer.self_attn.q_proj.weight.mul_(1 + torch.rand_like(layer.self_attn.q_proj.weight))
    model.save_pretrained(tmp_path / "full")
    arguments = tmp_path / "full", "--model", tiny_folder, "--modules", "q_proj", "v_proj"
    status, points = analyzed(*arguments, output=tmp_path / "out")
    (run,) = points.values()
    assert status == 0 and len(run["points"]) == (changed or 4)
    assert len(run["unchanged"]) == (4 - changed if changed else 0)
    assert set(run["spectra"]) == {p["name"] for p in run["points"]}
    said = f"{4 - changed} weights that the run left as they were are not counted"
    assert (said in capsys.readouterr().out) == bool(changed)


def test_what_points_json_says_of_the_last_checkpoint(tiny_folder, tmp_path, capsys):
    """Spectra, relative change of m and the gradient's shares, each what the functions say of the same weights."""
    from doratune.analysis import effective_rank, update_spectrum
    from doratune.analysis.gradients import batch_of
    from doratune.support.models import load_model, load_tokenizer

    data = tmp_path / "data.json"
    data.write_text('[{"instruction": "Is it?", "output": "the answer is true"}, {"instruction": "Was it?", "output": "false"}]')
    run = run_of(tmp_path / "dora", "dora", tiny_folder)
    merged = doratune.load(tiny_llama(), run / "adapter")
    doratune.merge(merged)
    merged.save_pretrained(tmp_path / "full")
    common = ("--modules", "q_proj", "--gradient_data", data, "--gradient_items", "2")
    status, found = analyzed(run, tmp_path / "full", *common, output=tmp_path / "out")
    dora, full = found[str(run)], found[str(tmp_path / "full")]
    assert status == 0
    base, name = load_model(str(tiny_folder)), "model.layers.1.self_attn.q_proj"
    batch = batch_of(str(data), base, load_tokenizer(str(tiny_folder)), 2)
    at_base = gradient_shares(base, batch, ["q_proj"])
    model = doratune.load(base, run / "adapter")
    layer = model.get_submodule(name)
    values = update_spectrum(layer)
    spectrum = dora["spectra"][name]
    assert spectrum["values"] == pytest.approx(values.tolist()) and spectrum["norm"] == pytest.approx(layer.weight.norm().item())
    assert set(dora["spectra"]) == set(at_base) == set(full["spectra"])
    assert dora["gradients"]["base"] == pytest.approx(at_base) and full["gradients"]["base"] == pytest.approx(at_base)
    assert dora["gradients"]["end"] == pytest.approx(gradient_shares(model, batch, ["q_proj"]))
    assert full["gradients"]["end"] == pytest.approx(dora["gradients"]["end"], rel=1e-3)  # the merged model is the adapted one
    assert len(full["spectra"][name]["values"]) == 32  # W_t − W_0 has all of them: m changed too
    point = next(p for p in dora["points"] if p["name"] == name and p["step"] == 4)
    w = layer.weight.norm(dim=1)
    assert point["relative"] == pytest.approx(((layer.magnitude - w).abs() / w).mean().item(), rel=1e-4)
    assert point["effective_rank"] == pytest.approx(effective_rank(values)) == spectrum["effective_rank"]
    assert point["gradient_share"] == dora["gradients"]["end"][name]
    assert all(p["effective_rank"] is None and p["relative"] > 0 for p in dora["points"] if p["step"] == 2)
    printed = capsys.readouterr().out
    mean = 100 * sum(at_base.values()) / len(at_base)
    assert f"magnitude's share of the gradient {mean:.3g} % at the base" in printed and "effective rank" in printed
    status, found = analyzed(run, tmp_path / "full", "--spectrum", "adapters", output=tmp_path / "less")
    assert found[str(run)]["spectra"] and not found[str(tmp_path / "full")]["spectra"]
    status, found = analyzed(run, "--spectrum", "none", output=tmp_path / "none")
    assert not found[str(run)]["spectra"] and not (tmp_path / "none" / "spectrum.png").exists()


def test_runs_and_checkpoints_that_cannot_be_measured(tiny_folder, tmp_path, capsys):
    """A line for each; everything else comes out, also where two folders have one name."""
    good, other = (run_of(tmp_path / place / "dora", "dora", tiny_folder) for place in ("a", "b"))
    partly, corrupt = (run_of(tmp_path / name, "lora", tiny_folder) for name in ("partly", "corrupt"))
    (partly / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for folder in corrupt.iterdir():
        (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    large = tmp_path / "large"
    doratune.save(doratune.attach(tiny_gpt2(), AdapterConfig(rank=2)), large / "adapter")
    wide = tiny_llama(layers=1)
    wide.model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.zeros(32, 40))
    wide.config.intermediate_size = 40
    for kept in ("gate_proj", "up_proj"):
        getattr(wide.model.layers[0].mlp, kept).weight = nn.Parameter(torch.zeros(40, 32))
    wide.save_pretrained(tmp_path / "wide")
    nan = run_of(tmp_path / "nan", "lora", tiny_folder)
    broken = doratune.load(tiny_llama(), nan / "adapter")
    with torch.no_grad():
        broken.model.layers[0].self_attn.q_proj.lora_B.fill_(float("nan"))
    for folder in nan.iterdir():
        doratune.save(broken, folder)
    runs = [corrupt, good, partly, other, large, tmp_path / "wide", nan, tmp_path / "nowhere"]
    status, found = analyzed(*runs, "--model", tiny_folder, "--format", "svg", output=tmp_path / "out")
    assert status == 0 and list(found) == list(map(str, [good, partly, other, corrupt, *runs[4:]]))
    problems = {key: value.get("problem", "") for key, value in found.items()}
    assert [p for p in found if "points" in found[p]] == [str(good), str(partly), str(other)]
    for run, words in (
        (corrupt, "truncated or corrupt"),
        (partly, "truncated or corrupt"),
        (large, "h.0"),
        (tmp_path / "wide", "shapes"),
        (nan, "NaN"),
        (tmp_path / "nowhere", "holds no adapter"),
    ):
        assert words in problems[str(run)] and "\n" not in problems[str(run)] and len(problems[str(run)]) <= 500, run
    assert {p["step"] for p in found[str(partly)]["points"]} == {4}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 + 1 + 5 + 2  # runs, the checkpoint, the rest, where it was written, the next command
    assert sum("left out: " in line for line in printed) == 1 and sum("not measured: " in line for line in printed) == 5
    for figure in ("scatter", "layers", "spectrum"):
        drawn = (tmp_path / "out" / f"{figure}.svg").read_text()
        assert all(f"<!-- {place}/{name}" in drawn for place, name in (("a", "dora"), (tmp_path.name, "partly"), ("b", "dora"))), (
            figure
        )


def test_a_model_unlike_its_own_config_is_one_line(tmp_path):
    import json

    from doratune.support.models import load_model

    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(UserError, match="its weights have other shapes than"):
        load_model(str(tmp_path))


def test_nothing_measured_is_a_mistake(tiny_folder, tmp_path, capsys):
    run = run_of(tmp_path / "dora", "dora", tiny_folder)
    for folder in run.iterdir():
        (folder / "adapter_model.safetensors").unlink()
    status, _ = analyzed(run, tmp_path / "nowhere", "--model", tiny_folder, output=tmp_path / "out")
    error = capsys.readouterr().err
    assert status == 2 and "is missing" in error and "holds no adapter" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs is not set"),
        (["--runs", "nowhere"], "holds no adapter"),
        (["--runs", "A", "A"], "twice"),
        (["--runs", "A", "--modules", "qproj"], "no weight is named qproj"),
        (["A", "--spectrum", "adapter"], "spectrum is 'adapter'; expected one of all, adapters, none"),
        (["A", "--gradient_data", "nowhere.json"], "nowhere.json"),
        (["A", "--gradient_data", "demo", "--gradient_items", "0"], "gradient_items is 0"),
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
