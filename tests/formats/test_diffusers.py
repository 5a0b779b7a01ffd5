"""diffusers' files, hand-made and its own, into a tiny UNet; and what we write, read by diffusers itself."""

import json

import pytest
import torch
from definitions import (
    CLOSE,
    UNET_CONV,
    UNET_CROSS,
    UNET_LINEAR,
    assert_merges_to,
    decomposed,
    denoised,
    magnitude,
    numbers,
    tiny_unet,
    with_weights,
    write,
)
from safetensors.torch import load_file

import doratune
from doratune.checkpoint.convert import convert
from doratune.errors import UserError

pytest.importorskip("diffusers")
RANKS = {UNET_LINEAR: 4, UNET_CROSS: 2, UNET_CONV: 4}
ALPHAS = {UNET_LINEAR: 8, UNET_CROSS: 8, UNET_CONV: 2}


def hand_made(path, settings=True, with_magnitude=True, pair=("lora_A", "lora_B"), vector="lora_magnitude_vector", alphas=False):
    base, tensors, weights = tiny_unet(), {}, {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        W, draw = base.get_submodule(name).weight.detach(), numbers(seed)
        A, B = draw(rank, *W.shape[1:]), draw(len(W), rank, *[1] * (W.dim() - 2))
        m, key = magnitude(W, seed).flatten(), f"unet.{name}"
        tensors |= {f"{key}.{pair[0]}.weight": A, f"{key}.{pair[1]}.weight": B}
        if with_magnitude:
            tensors[f"{key}.{vector}"] = m if W.dim() == 2 else m.view(1, -1, 1, 1)
        if alphas:
            tensors[f"{key}.alpha"] = torch.tensor(float(ALPHAS[name]))
        s = ALPHAS[name] / rank if settings or alphas else 1.0
        weights[name] = decomposed(W, s * (B.flatten(1) @ A.flatten(1)), m if with_magnitude else None)
    said = {
        "r": 4, "lora_alpha": 8, "use_dora": with_magnitude, "rank_pattern": {UNET_CROSS: 2}, "alpha_pattern": {"conv1": 2},
        "target_modules": list(RANKS), "bias": "none", "peft_type": "LORA",
    }  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in said.items()})} if settings else None
    return write(path, tensors, metadata), weights


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"settings": False},
        {"with_magnitude": False},
        {"settings": False, "alphas": True},
        {"vector": "lora_magnitude_vector.weight"},
        {"settings": False, "with_magnitude": False, "pair": ("lora.down", "lora.up")},
        {"settings": False, "with_magnitude": False, "pair": ("lora_linear_layer.down", "lora_linear_layer.up")},
    ],
)
def test_a_unet_computes_what_the_file_defines(case, tmp_path):
    path, weights = hand_made(tmp_path / "pytorch_lora_weights.safetensors", **case)
    for where in (path, tmp_path):
        model = doratune.load(tiny_unet(), where)
        torch.testing.assert_close(denoised(model), denoised(with_weights(tiny_unet(), weights)), **CLOSE)
        assert_merges_to(model, weights)


def loaded_by_diffusers(path):
    """The UNet as diffusers' own loader makes it: the two steps of `pipe.load_lora_weights`."""
    from diffusers import StableDiffusionPipeline

    unet = tiny_unet()
    tensors, alphas, metadata = StableDiffusionPipeline.lora_state_dict(path, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(tensors, alphas, unet, metadata=metadata)
    return unet.eval()


def test_diffusers_reads_hand_made_files_as_we_do(tmp_path):
    path, weights = hand_made(tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(denoised(loaded_by_diffusers(path)), denoised(with_weights(tiny_unet(), weights)), **CLOSE)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_diffusers_reads_what_we_write(method, tmp_path):
    config = doratune.AdapterConfig(
        method=method,
        rank=4,
        alpha=12,
        targets=["to_q", "to_k", "conv1"],
        rank_overrides={UNET_CROSS: 2},
        alpha_overrides={"conv1": 3},
    )
    model = doratune.attach(tiny_unet(), config)
    with torch.no_grad():
        for seed, (_, layer) in enumerate(doratune.adapters(model)):
            layer.lora_B.copy_(numbers(seed)(*layer.lora_B.shape))
            if layer.magnitude is not None:
                layer.magnitude.mul_(1.3)
    doratune.save(model, tmp_path / "adapter")
    convert(tmp_path / "adapter", "diffusers", tmp_path / "out", component="unet")
    path = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    torch.testing.assert_close(denoised(loaded_by_diffusers(path)), denoised(model), **CLOSE)
    torch.testing.assert_close(denoised(doratune.load(tiny_unet(), path)), denoised(model), **CLOSE)


def test_a_text_encoder_of_a_pipeline(tmp_path):
    """Its loader is transformers', which drops magnitudes whose names lack `.weight`."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        bos_token_id=1,
        eos_token_id=2,
    )

    def build():
        torch.manual_seed(0)
        return CLIPTextModel(config).eval()

    model = doratune.attach(build(), doratune.AdapterConfig(rank=2, alpha=6, targets=["fc1", "q_proj"]))
    with torch.no_grad():
        for seed, (_, layer) in enumerate(doratune.adapters(model)):
            layer.lora_B.copy_(numbers(seed)(*layer.lora_B.shape))
            layer.magnitude.mul_(1.4)
    doratune.save(model, tmp_path / "own")
    convert(tmp_path / "own", "diffusers", tmp_path / "out", component="text_encoder")
    tensors, alphas, metadata = StableDiffusionPipeline.lora_state_dict(tmp_path / "out", return_lora_metadata=True)
    theirs, ids = build(), torch.tensor([[1, 3, 4, 2]])
    StableDiffusionPipeline.load_lora_into_text_encoder(tensors, alphas, theirs, prefix="text_encoder", metadata=metadata)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).last_hidden_state, model(ids).last_hidden_state, **CLOSE)
        assert (model(ids).last_hidden_state - build()(ids).last_hidden_state).abs().max() > 1e-2


def test_a_file_of_diffusers_own(tmp_path):
    """Saved by `save_lora_adapter` of a UNet whose adapter PEFT made."""
    from peft import LoraConfig

    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=10, use_dora=True, target_modules=["to_q", "to_v", "conv1"]))
    with torch.no_grad():
        for seed, (name, p) in enumerate(unet.named_parameters()):
            if "lora" in name:
                p.mul_(1.2) if "magnitude" in name else p.add_(numbers(seed)(*p.shape))
    expected = denoised(unet)
    unet.save_lora_adapter(tmp_path)
    torch.testing.assert_close(denoised(doratune.load(tiny_unet(), tmp_path)), expected, **CLOSE)


def test_settings_that_would_change_the_result(tmp_path):
    path, _ = hand_made(tmp_path / "x.safetensors", with_magnitude=False)
    for name, value in (("lora_bias", True), ("bias", "all"), ("use_dora", True), ("lora_alpha", "8")):
        said = {"unet.r": 4, "unet.lora_alpha": 8, f"unet.{name}": value}
        bad = write(tmp_path / "bad.safetensors", load_file(path), {"lora_adapter_metadata": json.dumps(said)})
        with pytest.raises(UserError, match=name):
            doratune.load(tiny_unet(), bad)
    bad = write(tmp_path / "bad.safetensors", load_file(path), {"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="not valid JSON"):
        doratune.load(tiny_unet(), bad)
