"""Whole models of many families, built from configs: attach to all layers, one training step, save, load, merge, compare."""

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama

import doratune
from doratune import AdapterConfig

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokens(size=300, rows=2, length=9):
    return torch.randint(3, size, (rows, length), generator=torch.Generator().manual_seed(0))


def pixels(side=16):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=300, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL
    )
    return BertModel(config), {"input_ids": tokens()}


def vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(image_size=16, patch_size=4, **SMALL)), {"pixel_values": pixels()}


def bart():
    from transformers import BartConfig, BartModel

    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
    }
    config = BartConfig(vocab_size=300, d_model=32, max_position_embeddings=64, dropout=0.0, scale_embedding=True, **sides)
    return BartModel(config), {"input_ids": tokens(), "decoder_input_ids": tokens(length=5)}


def clip():
    from transformers import CLIPConfig, CLIPModel

    text = {**SMALL, "vocab_size": 300, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 16, "patch_size": 4}, projection_dim=24)
    return CLIPModel(config), {"input_ids": tokens(), "pixel_values": pixels()}


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**SMALL, image_size=16, patch_size=8, projection_dim=24)
    text = LlamaConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=128, **SMALL)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=299, vision_feature_select_strategy="default")
    ids = tokens(size=290, length=12)
    ids[:, 2:6] = 299
    return LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": pixels()}


def unet():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    return model, {"sample": x, "timestep": torch.tensor([10, 20]), "encoder_hidden_states": context}


def convnext():
    """Depthwise convolutions."""
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], patch_size=4)), {
        "pixel_values": pixels(32)
    }


FAMILIES = {
    "llama": lambda: (tiny_llama(), {"input_ids": tokens()}),
    "gpt2": lambda: (tiny_gpt2(), {"input_ids": tokens()}),
    "bert": bert,
    "vit": vit,
    "bart": bart,
    "clip": clip,
    "llava": llava,
    "unet": unet,
    "convnext": convnext,
}


def build(family):
    torch.manual_seed(0)
    model, inputs = FAMILIES[family]()
    return model.eval(), inputs


def outputs(model, inputs) -> list[torch.Tensor]:
    found = model(**inputs)
    values = [v for v in (found.values() if hasattr(found, "values") else [found]) if torch.is_tensor(v) and v.is_floating_point()]
    return values


@pytest.mark.parametrize("method", ["dora", "dvora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_saved_loaded_and_merged(family, method, tmp_path):
    model, inputs = build(family)
    with torch.no_grad():
        base = outputs(model, inputs)
    doratune.attach(model, AdapterConfig(method=method, rank=4, targets="all-layers"))
    kinds = {layer.adapted.kind.name for _, layer in doratune.adapters(model)}
    assert kinds == {"gpt2": {"Conv1D"}, "vit": {"Linear", "Conv"}, "clip": {"Linear", "Conv"}, "llava": {"Linear", "Conv"}}.get(
        family, {"Linear", "Conv"} if family in ("unet", "convnext") else {"Linear"}
    )
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), base, strict=True))
    report = doratune.verify(model)
    assert report.ok, report
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=0.02))
    for _ in range(2):
        sum(v.float().square().mean() for v in outputs(model, inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = outputs(model, inputs)
        assert max((a - b).abs().max() for a, b in zip(trained, base, strict=True)) > 1e-3
        doratune.save(model, tmp_path)
        again = doratune.load(build(family)[0], tmp_path)
        for a, b in zip(outputs(again, inputs), trained, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        doratune.merge(model)
        for a, b in zip(outputs(model, inputs), trained, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
        doratune.unmerge(model)
        doratune.detach(model)
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), base, strict=True))


def test_a_folder_that_lacks_a_tensor_is_refused(tiny_folder, tmp_path):
    """transformers would put random numbers in its place."""
    import shutil

    from safetensors.torch import load_file, save_file

    from doratune.errors import UserError
    from doratune.support.models import load_model

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.self_attn\.q_proj\.weight; transformers"):
        load_model(str(folder))
    assert load_model(str(tiny_folder)) is not None
