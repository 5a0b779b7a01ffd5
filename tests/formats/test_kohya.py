"""kohya's and LyCORIS's files, hand-made from their definition: LoRA, LoHa, LoKr, Tucker cores, both axes, convolutions."""

import pytest
import torch
from conftest import tiny_llama
from definitions import (
    CLOSE,
    IMAGES,
    UNET_CONV,
    UNET_CROSS,
    UNET_LINEAR,
    Convolutional,
    assert_merges_to,
    decomposed,
    denoised,
    logits,
    magnitude,
    numbers,
    tiny_unet,
    with_weights,
    write,
)

import doratune
from doratune.errors import UserError

Q, K, DOWN = (f"model.layers.{n}" for n in ("0.self_attn.q_proj", "1.self_attn.k_proj", "0.mlp.down_proj"))


def flat(name, prefix="lycoris_"):
    return prefix + name.replace(".", "_")


def lora(W, key, seed, alpha=3.0, rank=2, axis="output", scale=True, core=False):
    """(tensors, W') of a LoCon module; core: Tucker's."""
    draw, O, I, *k = numbers(seed), *W.shape
    up = draw(O, rank, *[1] * len(k))
    if core:
        down, mid = draw(rank, I, *[1] * len(k)), draw(rank, rank, *k)
        delta = torch.einsum("op,pqkl,qi->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
        tensors = {f"{key}.lora_mid.weight": mid}
    else:
        down, tensors = draw(rank, I, *k), {}
        delta = (up.flatten(1) @ down.flatten(1)).view(W.shape)
    m = magnitude(W, seed, axis) if scale else None
    tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    tensors |= {f"{key}.dora_scale": m} if scale else {}
    return tensors, decomposed(W, alpha / rank * delta, m, axis)


def loha(W, key, seed, alpha=1.0, rank=2, axis="output", scale=True, core=False):
    draw, O, I, *k = numbers(seed, 0.6), *W.shape
    if core:
        t1, t2 = draw(rank, rank, *k), draw(rank, rank, *k)
        a1, b1, a2, b2 = draw(rank, O), draw(rank, I), draw(rank, O), draw(rank, I)
        build = lambda t, a, b: torch.einsum("ijkl,jr,ip->prkl", t, b, a)  # noqa: E731
        delta, extra = build(t1, a1, b1) * build(t2, a2, b2), {f"{key}.hada_t1": t1, f"{key}.hada_t2": t2}
    else:
        columns = W[0].numel()
        a1, b1, a2, b2 = draw(O, rank), draw(rank, columns), draw(O, rank), draw(rank, columns)
        delta, extra = ((a1 @ b1) * (a2 @ b2)).view(W.shape), {}
    m = magnitude(W, seed, axis) if scale else None
    tensors = {f"{key}.hada_w1_a": a1, f"{key}.hada_w1_b": b1, f"{key}.hada_w2_a": a2, f"{key}.hada_w2_b": b2}
    tensors |= extra | {f"{key}.alpha": torch.tensor(alpha)} | ({f"{key}.dora_scale": m} if scale else {})
    return tensors, decomposed(W, alpha / rank * delta, m, axis)


def lokr(W, key, seed, split, alpha=3.0, rank=2, axis="output", whole=False, both=False):
    """split: (rows, columns) of w1; whole: w2 as one matrix; both: w1 as a product, too."""
    draw, O, I, *k = numbers(seed, 0.6), *W.shape
    o, i = split
    w1_a, w1_b = draw(o, rank), draw(rank, i)
    w1 = w1_a @ w1_b if both else draw(o, i)
    rows, columns = O // o, I // i
    a, b = draw(rows, rank), draw(rank, columns * torch.Size(k).numel())
    w2 = draw(rows, columns, *k) if whole else (a @ b).view(rows, columns, *k)
    delta = torch.kron(w1.view(*w1.shape, *[1] * len(k)), w2)
    m = magnitude(W, seed, axis)
    tensors = {f"{key}.lokr_w1_a": w1_a, f"{key}.lokr_w1_b": w1_b} if both else {f"{key}.lokr_w1": w1}
    tensors |= {f"{key}.lokr_w2": w2} if whole else {f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b}
    s = 1.0 if whole and not both else alpha / rank
    tensors |= {f"{key}.alpha": torch.tensor(alpha), f"{key}.dora_scale": m}
    return tensors, decomposed(W, s * delta, m, axis)


LLAMA = {
    "lora, output axis": [(lora, Q, {}), (lora, K, {"rank": 3}), (lora, DOWN, {"alpha": 8.0})],
    "lora, input axis": [(lora, n, {"axis": "input"}) for n in (Q, K, DOWN)],
    "lora without magnitude": [(lora, n, {"scale": False}) for n in (Q, DOWN)],
    "loha": [(loha, n, {}) for n in (Q, K, DOWN)],
    "loha, input axis": [(loha, n, {"axis": "input"}) for n in (Q, DOWN)],
    "lokr, our split": [(lokr, Q, {"split": (4, 4)}), (lokr, K, {"split": (4, 4)})],
    "lokr, another split": [(lokr, Q, {"split": (8, 2)}), (lokr, K, {"split": (2, 8)})],
    "lokr, w2 whole": [(lokr, Q, {"split": (4, 4), "whole": True}), (lokr, DOWN, {"split": (8, 8), "whole": True})],
    "lokr, both decomposed": [(lokr, Q, {"split": (4, 4), "both": True})],
    "lokr, input axis": [(lokr, DOWN, {"split": (4, 6), "axis": "input"})],
    "lora beside loha and lokr": [(lora, Q, {}), (loha, K, {}), (lokr, DOWN, {"split": (4, 6)})],
}


def hand_made(model, modules, path, prefix="lycoris_"):
    tensors, weights = {}, {}
    for seed, (build, name, settings) in enumerate(modules, 1):
        own, weights[name] = build(model.get_submodule(name).weight, flat(name, prefix), seed, **settings)
        tensors |= own
    return write(path, tensors), weights


@pytest.mark.parametrize("case", LLAMA)
def test_a_llama_computes_what_the_file_defines(case, tmp_path):
    path, weights = hand_made(tiny_llama(), LLAMA[case], tmp_path / "style.safetensors")
    model = doratune.load(tiny_llama(), path)
    torch.testing.assert_close(logits(model), logits(with_weights(tiny_llama(), weights)), **CLOSE)
    assert_merges_to(model, weights)


CONVOLUTIONS = {
    "lora": [(lora, "first", {}), (lora, "second", {}), (lora, "head", {})],
    "tucker": [(lora, "first", {"core": True})],
    "loha": [(loha, "first", {}), (loha, "second", {})],
    "loha, tucker": [(loha, "first", {"core": True})],
    "lokr": [(lokr, "first", {"split": (2, 2)}), (lokr, "second", {"split": (2, 2)})],
    "lokr, w2 whole": [(lokr, "first", {"split": (2, 2), "whole": True}), (lokr, "head", {"split": (1, 2)})],
    "1 x 1, input axis": [(lora, "second", {"axis": "input"}), (lora, "head", {"axis": "input"})],
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case, tmp_path):
    path, weights = hand_made(Convolutional(), CONVOLUTIONS[case], tmp_path / "x.safetensors", "lora_unet_")
    model = doratune.load(Convolutional(), path)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), with_weights(Convolutional(), weights)(IMAGES), **CLOSE)
    assert_merges_to(model, weights)


def test_a_unet_and_what_is_the_text_encoder_s(tmp_path):
    modules = [(lora, UNET_LINEAR, {}), (lora, UNET_CROSS, {"rank": 4}), (lora, UNET_CONV, {})]
    path, weights = hand_made(tiny_unet(), modules, tmp_path / "x.safetensors", "lora_unet_")
    dense = with_weights(tiny_unet(), weights)
    torch.testing.assert_close(denoised(doratune.load(tiny_unet(), path)), denoised(dense), **CLOSE)
    from safetensors.torch import load_file

    other, _ = lora(torch.randn(8, 8), "lora_te_text_model_encoder_layers_0_mlp_fc1", 3)
    both = write(tmp_path / "both.safetensors", load_file(path) | other)
    assert_merges_to(doratune.load(tiny_unet(), both), weights)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_a_bare_vector_on_a_square_layer_has_to_be_said(axis, tmp_path):
    model = tiny_llama()
    tensors, weight = lora(model.get_submodule(Q).weight, flat(Q), 1, axis=axis)
    tensors[f"{flat(Q)}.dora_scale"] = tensors[f"{flat(Q)}.dora_scale"].flatten()
    path = write(tmp_path / "bare.safetensors", tensors)
    with pytest.raises(UserError, match=r"bare vector of 32 numbers and the layer is 32 × 32.*magnitude_axis"):
        doratune.load(tiny_llama(), path)
    loaded = doratune.load(tiny_llama(), path, magnitude_axis=axis)
    torch.testing.assert_close(logits(loaded), logits(with_weights(model, {Q: weight})), **CLOSE)


@pytest.mark.parametrize(("name", "axis"), [(K, "output"), (K, "input"), (DOWN, "output"), (DOWN, "input")])
def test_a_bare_vector_elsewhere_says_its_axis_by_its_length(name, axis, tmp_path):
    model = tiny_llama()
    tensors, weight = lora(model.get_submodule(name).weight, flat(name), 1, axis=axis)
    tensors[f"{flat(name)}.dora_scale"] = tensors[f"{flat(name)}.dora_scale"].flatten()
    path = write(tmp_path / "bare.safetensors", tensors)
    torch.testing.assert_close(logits(doratune.load(tiny_llama(), path)), logits(with_weights(model, {name: weight})), **CLOSE)
    with pytest.raises(UserError, match="magnitudes for the"):
        doratune.load(tiny_llama(), path, magnitude_axis="input" if axis == "output" else "output")


def test_an_axis_that_the_shape_contradicts(tmp_path):
    path, _ = hand_made(tiny_llama(), [(lora, Q, {})], tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"shape \(32, 1\), a magnitude on the output axis; magnitude_axis says 'input'"):
        doratune.load(tiny_llama(), path, magnitude_axis="input")


def test_both_axes_in_one_file(tmp_path):
    path, _ = hand_made(tiny_llama(), [(lora, Q, {}), (lora, K, {"axis": "input"})], tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="both axes"):
        doratune.load(tiny_llama(), path)


@pytest.mark.parametrize("build", [lora, loha])
def test_input_channels_of_a_kernel_are_refused(build, tmp_path):
    path, _ = hand_made(Convolutional(), [(build, "first", {"axis": "input"})], tmp_path / "x.safetensors", "lora_unet_")
    model = Convolutional()
    with pytest.raises(UserError, match="per input channel of a convolution over 9 positions"):
        doratune.load(model, path)
    assert not list(doratune.adapters(model))


def test_alpha_that_is_missing_is_the_rank(tmp_path):
    model = tiny_llama()
    tensors, weight = lora(model.get_submodule(Q).weight, flat(Q), 1, alpha=2.0, rank=2)
    del tensors[f"{flat(Q)}.alpha"]
    path = write(tmp_path / "x.safetensors", tensors)
    torch.testing.assert_close(logits(doratune.load(tiny_llama(), path)), logits(with_weights(model, {Q: weight})), **CLOSE)
