"""Names of the original Stable Diffusion and of CLIP before transformers 5, against diffusers' own converter."""

import pytest
import torch
from conftest import randomize
from definitions import numbers, write

import doratune
from doratune import AdapterConfig
from doratune.checkpoint.convert import convert
from doratune.formats.names import ModelNames
from doratune.formats.spellings import spellings

diffusers = pytest.importorskip("diffusers")


def sdxl_like(layers=2):
    """A UNet with SDXL's blocks: two down and two up with attention, two and three layers, an added embedding."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
    ).eval()


BY_HAND = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_k": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",
    "input_blocks.8.0.emb_layers.1": "down_blocks.2.resnets.1.time_emb_proj",
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.transformer_blocks.1.ff.net.2": "mid_block.attentions.0.transformer_blocks.1.ff.net.2",
    "middle_block.2.in_layers.2": "mid_block.resnets.1.conv1",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.1.proj_in": "up_blocks.1.attentions.2.proj_in",
    "output_blocks.6.0.skip_connection": "up_blocks.2.resnets.0.conv_shortcut",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "out.2": "conv_out",
}


def test_names_of_sdxl():
    unet = sdxl_like()
    known = spellings(ModelNames.of(unet).shapes, unet.config)
    assert {spelled: known.get(spelled) for spelled in BY_HAND} == BY_HAND
    assert set(known.values()) == set(ModelNames.of(unet).shapes)  # every layer has one, no two the same


def test_as_diffusers_converts_them():
    """Its converter knows LoRA keys of attention and of resnets' convolutions."""
    from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers

    unet = sdxl_like()
    known = spellings(ModelNames.of(unet).shapes, unet.config)
    chosen = {s: n for s, n in known.items() if ".attn" in n or n.endswith((".conv1", ".conv2"))}
    assert len(chosen) > 40
    for spelled, name in chosen.items():
        key = "lora_unet_" + spelled.replace(".", "_") + ".lora_down.weight"
        (mapped,) = _maybe_map_sgm_blocks_to_diffusers({key: 0}, unet.config)
        theirs = _convert_unet_lora_key(mapped).replace("_lora.down.weight", "").replace(".lora.down.weight", "")
        assert theirs.replace(".processor", "").replace("to_out", "to_out.0") == name, spelled


def test_a_file_in_the_original_names_loads(tmp_path):
    model = doratune.attach(sdxl_like(), AdapterConfig(rank=2, targets=["to_q", "conv1", "conv2", "linear_1", "conv_in"]))
    randomize(model)
    doratune.save(model, tmp_path / "own")
    convert(tmp_path / "own", "kohya", tmp_path / "x.safetensors", component="unet")
    from safetensors.torch import load_file

    spelled = {name.replace(".", "_"): other for other, name in spellings(ModelNames.of(sdxl_like()).shapes, model.config).items()}
    renamed = {}
    for key, tensor in load_file(tmp_path / "x.safetensors").items():
        module, _, part = key.removeprefix("lora_unet_").partition(".")
        renamed[f"lora_unet_{spelled[module].replace('.', '_')}.{part}"] = tensor
    again = doratune.load(sdxl_like(), write(tmp_path / "original.safetensors", renamed))
    layers = dict(doratune.adapters(again))
    for name, layer in doratune.adapters(model):
        assert torch.equal(layer.lora_A, layers[name].lora_A) and torch.equal(layer.magnitude, layers[name].magnitude)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(
    "spelled", ["text_encoder.text_model.encoder", "lora_te1_text_model_encoder", "lora_te_text_model_encoder"]
)
def test_clip_has_text_model_in_front_or_not(projection, spelled, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, projection_dim=8,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    draw, flat = numbers(1), "_text_model_" in spelled
    key = f"{spelled}.layers.0.mlp.fc1".replace(".", "_") if flat else f"{spelled}.layers.0.mlp.fc1"
    pair = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
    tensors = {f"{key}.{pair[0]}.weight": draw(2, 8), f"{key}.{pair[1]}.weight": draw(16, 2)}
    doratune.load(model, write(tmp_path / "x.safetensors", tensors))
    ((name, _),) = doratune.adapters(model)
    assert name.endswith("encoder.layers.0.mlp.fc1")
    if flat:
        doratune.save(model, tmp_path / "own")
        convert(tmp_path / "own", "kohya", tmp_path / "y.safetensors", component="text_encoder")
        from safetensors.torch import load_file

        assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in load_file(tmp_path / "y.safetensors")
