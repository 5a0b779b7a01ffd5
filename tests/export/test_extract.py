"""Extraction: the fit is exact where W' is a DoRA weight, better than a plain SVD elsewhere, and says its error as it is."""

import json

import pytest
import torch
from conftest import randomize
from transformers import AutoModelForCausalLM

import doratune
from doratune import UserError
from doratune.cli.main import main
from doratune.export.extract import extract
from doratune.export.fit import composed, fit

IDS = torch.arange(3, 60)[None]


def weights(O, I, rank, magnitudes, noise, seed=0):
    """(W, W' = m ⊙ V/|V| + noise): V = W + B·A of this rank, m off by up to ± `magnitudes`."""
    torch.manual_seed(seed)
    W = torch.randn(O, I)
    V = W + 0.1 * torch.randn(O, rank) @ torch.randn(rank, I)
    g = 1 + magnitudes * (2 * torch.rand(O, 1) - 1)
    tuned = g * V
    return W, tuned + noise * tuned.norm() / (O * I) ** 0.5 * torch.randn(O, I)


def error(W, tuned, A, B):
    m, free = tuned.norm(dim=1), torch.ones(len(W), dtype=torch.bool)
    return ((tuned - composed(W, A, B, m, free)).norm() / (tuned - W).norm()).item()


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 33)])
def test_a_dora_weight_is_found_again(shape):
    W, tuned = weights(*shape, rank=4, magnitudes=0.4, noise=0.0)
    found = fit(W, tuned, 4)
    assert found.relative < 2e-3 < 0.2 < found.plain_relative
    assert torch.allclose(found.m, tuned.norm(dim=1))


@pytest.mark.parametrize("rank", [2, 8, 16])
@pytest.mark.parametrize("magnitudes", [0.05, 0.3])
def test_better_than_plain_svd_with_the_magnitudes_put_on(rank, magnitudes):
    W, tuned = weights(64, 96, rank=12, magnitudes=magnitudes, noise=0.1)
    found = fit(W, tuned, rank)
    U, S, Vh = torch.linalg.svd(tuned - W, full_matrices=False)
    plain = error(W, tuned, Vh[:rank], U[:, :rank] * S[:rank])
    assert found.plain_relative == pytest.approx(plain, rel=1e-4)
    assert found.relative == pytest.approx(error(W, tuned, found.A, found.B), rel=1e-4)
    assert found.relative < plain * (0.99 if magnitudes > 0.1 else 1.0)


def test_no_gradient_step_finds_a_much_better_one():
    """From the fit on, 300 steps of Adam on A and B lower the error by less than 2 %."""
    W, tuned = weights(48, 64, rank=12, magnitudes=0.3, noise=0.2)
    found = fit(W, tuned, 8)
    A, B = found.A.clone().requires_grad_(), found.B.clone().requires_grad_()
    optimizer = torch.optim.Adam([A, B], lr=2e-3)
    free = torch.ones(48, dtype=torch.bool)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (tuned - composed(W, A, B, found.m, free)).square().sum()
        loss.backward()
        optimizer.step()
    assert loss.detach().sqrt() / (tuned - W).norm() > 0.98 * found.relative


def test_zero_rows_are_plain_lora_rows():
    W, tuned = weights(40, 30, rank=3, magnitudes=0.2, noise=0.0)
    W[5] = 0
    tuned[5] = torch.randn(30)
    found = fit(W, tuned, 6)
    assert torch.isfinite(found.A).all() and torch.isfinite(found.B).all()
    free = torch.arange(40) != 5
    assert (tuned - composed(W, found.A, found.B, found.m, free))[5].norm() < 0.1 * tuned[5].norm()


def fine_tuned(folder, tmp_path, tokenizer, everything=True, dtype=torch.float32):
    """A model folder whose weights all moved: a low-rank part, row scales and noise."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name and "lm_head" not in name:
                low = torch.randn(len(p), 2) @ torch.randn(2, p.shape[1])
                p.copy_((1 + 0.2 * torch.rand(len(p), 1)) * (p + 0.02 * low) + 2e-3 * torch.randn_like(p))
            elif everything:
                p.add_(0.05 * torch.randn_like(p))
    model = model.to(dtype)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    return model.float()


def test_the_adapter_folder_says_what_was_measured(tmp_path, tiny_folder, tiny_tokenizer, capsys):
    tuned = fine_tuned(tiny_folder, tmp_path, tiny_tokenizer)
    words = ["--model", str(tiny_folder), "--tuned", str(tmp_path / "tuned"), "--rank", "6", "--json"]
    assert main(["extract", *words, "--output", str(tmp_path / "adapter")]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    doratune.merge(doratune.load(base, tmp_path / "adapter"))
    assert len(result["layers"]) == 14
    for name, values in result["layers"].items():
        W, W_tuned, merged = (p[f"{name}.weight"] for p in (before, dict(tuned.named_parameters()), dict(base.named_parameters())))
        assert values["missing"] == pytest.approx(((W_tuned - merged).norm() / (W_tuned - W).norm()).item(), rel=1e-3)
        assert values["missing"] < values["plain_missing"]
        assert torch.allclose(merged.norm(dim=1), W_tuned.norm(dim=1), rtol=1e-4)
    assert set(result["elsewhere"]) >= {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert "--also_train" in printed


def test_modules_stored_whole(tmp_path, tiny_folder, tiny_tokenizer):
    """With embeddings, head and norms stored whole, and the full rank, the adapted base is the fine-tuned model."""
    tuned = fine_tuned(tiny_folder, tmp_path, tiny_tokenizer)
    whole = ["embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"]
    found = extract(str(tiny_folder), str(tmp_path / "tuned"), tmp_path / "adapter", rank=64, also_train=whole)
    assert found.elsewhere == {} and found.missing < 1e-4
    base = doratune.load(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(base(IDS).logits, tuned(IDS).logits, atol=1e-3)


def test_of_an_adapter_that_was_merged(tmp_path, tiny_folder):
    """A merged DoRA adapter of the same rank is found again: the same logits."""
    from doratune.checkpoint.merge import merge_checkpoint

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    doratune.attach(model, doratune.AdapterConfig(rank=3, alpha=3, targets=["q_proj", "v_proj", "up_proj"]))
    doratune.save(randomize(model, scale=0.05), tmp_path / "adapter")
    merge_checkpoint(str(tiny_folder), tmp_path / "adapter", tmp_path / "tuned")
    targets = ["q_proj", "v_proj", "up_proj"]
    found = extract(str(tiny_folder), str(tmp_path / "tuned"), tmp_path / "again", rank=3, targets=targets)
    assert found.missing < 5e-3 and found.elsewhere == {}
    again = doratune.load(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "again")
    with torch.no_grad():
        assert (again(IDS).logits - model(IDS).logits).norm() < 5e-3 * model(IDS).logits.norm()


@pytest.mark.parametrize("bad", ["layers", "vocabulary", "nan", "output"])
def test_bad_input(bad, tmp_path, tiny_folder, tiny_tokenizer, capsys):
    from conftest import tiny_llama

    model = tiny_llama(layers=1 if bad == "layers" else 2)
    if bad == "vocabulary":
        model.resize_token_embeddings(310)
    if bad == "nan":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer.save_pretrained(tmp_path / "tuned")
    if bad == "output":
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "mine").write_text("mine")
    expected = {"layers": "is missing", "vocabulary": "has shape", "nan": "NaN", "output": "not empty"}[bad]
    words = ["--model", str(tiny_folder), "--tuned", str(tmp_path / "tuned"), "--output", str(tmp_path / "adapter")]
    assert main(["extract", *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists() or [p.name for p in (tmp_path / "adapter").iterdir()] == ["mine"]
    with pytest.raises(UserError, match=expected):
        extract(str(tiny_folder), str(tmp_path / "tuned"), tmp_path / "adapter")
