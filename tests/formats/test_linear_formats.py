"""torchtune, mlx-lm, ai-toolkit and the authors' files, hand-made from their definitions, on a tiny Llama."""

import pytest
import torch
from conftest import tiny_llama
from definitions import (
    CLOSE,
    assert_merges_to,
    decomposed,
    logits,
    magnitude,
    norms,
    numbers,
    with_weights,
    write,
    write_settings,
)

import doratune
from doratune.errors import UserError

NAMES = [f"model.layers.{n}" for n in ("0.self_attn.q_proj", "0.self_attn.k_proj", "1.self_attn.v_proj", "1.mlp.down_proj")]


def drawn(model, name, seed, rank=3):
    """(W, A (R, I), B (O, R), m (O,)) of one module."""
    W, draw = model.get_submodule(name).weight.detach(), numbers(seed)
    return W, draw(rank, W.shape[1]), draw(len(W), rank), magnitude(W, seed).flatten()


def neighbours(W, heads):
    """transformers' rows of q or k as torchtune orders them: number j and j + half of a head side by side."""
    size = len(W) // heads
    order = [h * size + half * size // 2 + j for h in range(heads) for j in range(size // 2) for half in (0, 1)]
    return W[order]


HEADS = {"q_proj": 4, "k_proj": 2}
TORCHTUNE = {"q_proj": "attn.q_proj", "k_proj": "attn.k_proj", "v_proj": "attn.v_proj", "down_proj": "mlp.w2"}


def torchtune(model, s, with_magnitude=True):
    tensors, weights = {}, {}
    for seed, name in enumerate(NAMES):
        W, A, B, m = drawn(model, name, seed)
        layer, kind = name.split(".")[2], name.split(".")[-1]
        key, heads = f"layers.{layer}.{TORCHTUNE[kind]}", HEADS.get(kind, len(W) // 2)
        move = (lambda t, heads=heads: neighbours(t, heads)) if kind in HEADS else (lambda t: t)
        tensors |= {f"{key}.lora_a.weight": A, f"{key}.lora_b.weight": move(B)}
        tensors |= {f"{key}.magnitude": move(m)} if with_magnitude else {}
        weights[name] = decomposed(W, s * B @ A, m if with_magnitude else None)
        # torchtune computes with its own order of W's rows, and transformers with the result in the order of today
        own = decomposed(move(W), s * move(B) @ A, move(m) if with_magnitude else None)
        assert torch.equal(move(weights[name]), own)
    return tensors, weights


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("with_magnitude", [True, False])
def test_torchtune(suffix, with_magnitude, tmp_path):
    tensors, weights = torchtune(tiny_llama(), 16 / 3, with_magnitude)
    path = tmp_path / f"adapter_0.{suffix}"
    write(path, tensors) if suffix == "safetensors" else torch.save(tensors, path)
    with pytest.raises(UserError, match="do not hold alpha"):
        doratune.load(tiny_llama(), path)
    model = doratune.load(tiny_llama(), path, alpha=16)
    torch.testing.assert_close(logits(model), logits(with_weights(tiny_llama(), weights)), **CLOSE)
    assert_merges_to(model, weights)


def test_torchtune_in_a_folder_with_its_settings(tmp_path):
    tensors, weights = torchtune(tiny_llama(), 16 / 3)
    write(tmp_path / "adapter_3.safetensors", tensors)
    write_settings(tmp_path, {"r": 3, "lora_alpha": 16, "target_modules": ["q_proj"], "peft_type": "LORA"})
    assert_merges_to(doratune.load(tiny_llama(), tmp_path), weights)
    write(tmp_path / "adapter_4.safetensors", tensors)
    with pytest.raises(UserError, match=r"several adapters \(adapter_3.safetensors, adapter_4.safetensors\)"):
        doratune.load(tiny_llama(), tmp_path)


def test_torchtune_s_own_file_is_taken_beside_its_export(tmp_path):
    """Its export moves the rows of B and not those of m (torchtune 0.6.1, `tune_to_peft_adapter_weights`)."""
    tensors, weights = torchtune(tiny_llama(), 16 / 3)
    exported = {}
    for seed, name in enumerate(NAMES):
        W, A, B, m = drawn(tiny_llama(), name, seed)
        wrong = neighbours(m, HEADS[name.split(".")[-1]]) if name.split(".")[-1] in HEADS else m
        key = f"base_model.model.{name}"
        exported |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B, f"{key}.lora_magnitude_vector": wrong}
    write(tmp_path / "adapter_model.safetensors", exported)
    write_settings(tmp_path, {"peft_type": "LORA", "r": 3, "lora_alpha": 16, "use_dora": True, "target_modules": ["q_proj"]})
    torch.save(tensors, tmp_path / "adapter_model.pt")
    assert_merges_to(doratune.load(tiny_llama(), tmp_path), weights)


def mlx(model, scale):
    tensors, weights = {}, {}
    for seed, name in enumerate(NAMES):
        W, A, B, m = drawn(model, name, seed)
        tensors |= {f"{name}.lora_a": A.T, f"{name}.lora_b": B.T, f"{name}.m": m}
        weights[name] = decomposed(W, scale * B @ A, m)
    return tensors, weights


def mlx_settings(scale):
    return {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": scale, "dropout": 0.0}}


def test_mlx(tmp_path):
    tensors, weights = mlx(tiny_llama(), 20.0)
    write(tmp_path / "adapters.safetensors", tensors)
    with pytest.raises(UserError, match=r"no lora_parameters.scale"):
        doratune.load(tiny_llama(), tmp_path)
    write_settings(tmp_path, mlx_settings(20.0))
    for path in (tmp_path, tmp_path / "adapters.safetensors"):
        assert_merges_to(doratune.load(tiny_llama(), path), weights)


def test_mlx_embeddings_have_a_magnitude_per_token(tmp_path):
    base, draw, name = tiny_llama(), numbers(1), "model.embed_tokens"
    W = base.get_submodule(name).weight.detach()
    a, b = draw(len(W), 2), draw(2, W.shape[1])
    n = norms(W)
    m = n.float().flatten() * (1 + 0.3 * torch.rand(len(W), generator=torch.Generator().manual_seed(1)))
    weight = decomposed(W, 4.0 * a @ b, m)
    weight[0] = W[0].double() + 4.0 * (a @ b)[0].double()  # the padding row is 0: it has no direction
    write(tmp_path / "adapters.safetensors", {f"{name}.lora_a": a, f"{name}.lora_b": b, f"{name}.m": m})
    write_settings(tmp_path, mlx_settings(4.0))
    model = doratune.load(base, tmp_path)
    torch.testing.assert_close(logits(model), logits(with_weights(tiny_llama(), {name: weight})), **CLOSE)


@pytest.mark.parametrize("pair", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("vector", ["magnitude", "dora_scale"])
def test_ai_toolkit(pair, vector, tmp_path):
    if (pair[0], vector) == ("lora_down", "dora_scale"):
        pytest.skip("that is kohya's")
    tensors, weights, base = {}, {}, tiny_llama()
    for seed, name in enumerate(NAMES):
        W, A, B, m = drawn(base, name, seed)
        key = f"transformer.{name}"
        tensors |= {f"{key}.{pair[0]}.weight": A, f"{key}.{pair[1]}.weight": B}
        tensors[f"{key}.{vector}"] = m if vector == "magnitude" else m[:, None]
        weights[name] = decomposed(W, B @ A, m)
    path = write(tmp_path / "flux.safetensors", tensors)
    model = doratune.load(tiny_llama(), path)  # q is square: the format says the axis of a bare vector
    torch.testing.assert_close(logits(model), logits(with_weights(base, weights)), **CLOSE)
    assert_merges_to(model, weights)


def authors(model, s, layout, only=()):
    """layout: commonsense, or llava with its adapter's name in the keys."""
    tensors, weights = {}, {}
    infix = "" if layout == "commonsense" else ".default"
    for seed, name in enumerate(NAMES):
        W, A, B, m = drawn(model, name, seed)
        key = f"base_model.model.{name}"
        if name in only:
            B = torch.zeros_like(B)
        else:
            tensors |= {f"{key}.lora_A{infix}.weight": A, f"{key}.lora_B{infix}.weight": B}
        tensors[f"{key}.weight_m_wdecomp{infix}.weight"] = m[:, None]
        weights[name] = decomposed(W, s * B @ A, m)
    return tensors, weights


@pytest.mark.parametrize("layout", ["commonsense", "llava"])
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
def test_the_authors_files(layout, file, tmp_path):
    tensors, weights = authors(tiny_llama(), 6 / 3, layout, only=NAMES[2:3])
    only = "Wdecompose_target_modules" if layout == "commonsense" else "wdecompose_target_modules"
    write_settings(tmp_path, {"peft_type": "DORA", "r": 3, "lora_alpha": 6, "bias": "none", "lora_dropout": 0.05, only: ["v_proj"]})
    write(tmp_path / file, tensors) if file.endswith("safetensors") else torch.save(tensors, tmp_path / file)
    model = doratune.load(tiny_llama(), tmp_path)
    assert [layer.lora_A is None for _, layer in doratune.adapters(model)] == [False, False, True, False]
    torch.testing.assert_close(logits(model), logits(with_weights(tiny_llama(), weights)), **CLOSE)
    assert_merges_to(model, weights)


def test_llava_modules_that_were_trained_whole(tmp_path):
    tensors, weights = authors(tiny_llama(), 6 / 3, "llava")
    write_settings(tmp_path, {"peft_type": "DORA", "r": 3, "lora_alpha": 6, "bias": "none"})
    torch.save(tensors, tmp_path / "adapter_model.bin")
    head = 0.1 * torch.randn(300, 32, generator=torch.Generator().manual_seed(4))
    torch.save({"base_model.model.lm_head.weight": head}, tmp_path / "non_lora_trainables.bin")
    model = doratune.load(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(with_weights(tiny_llama(), weights | {"lm_head": head})), **CLOSE)


def test_two_programs_adapters_on_one_model(tmp_path):
    """By name, switched: each gives what its file defines."""
    tensors, weights = mlx(tiny_llama(), 2.0)
    write(tmp_path / "mlx" / "adapters.safetensors", tensors)
    write_settings(tmp_path / "mlx", mlx_settings(2.0))
    others, others_weights = torchtune(tiny_llama(), 4 / 3)
    write(tmp_path / "adapter_0.safetensors", others)
    model = doratune.load(tiny_llama(), tmp_path / "mlx", name="mlx")
    doratune.load(model, tmp_path / "adapter_0.safetensors", name="torchtune", alpha=4)
    for name, expected in (("torchtune", others_weights), ("mlx", weights), ("torchtune", others_weights)):
        doratune.use(model, name)
        torch.testing.assert_close(logits(model), logits(with_weights(tiny_llama(), expected)), **CLOSE)
