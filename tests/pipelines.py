"""Tiny text-to-image pipelines of diffusers, built from configs, as folders; and photographs of one thing."""

import json

import numpy as np
import torch
from PIL import Image

SIDE = 16
WORDS = ("a", "photo", "of", "sks", "dog", "icon", "in", "the", "style", "tok", "red", "blue", "square")


def clip_tokenizer(folder):
    """CLIP's tokenizer over letters and a few whole words."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = f"{pieces[0]} {pieces[1]}"
            merges += [pair] if pair not in merges else []
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary += [pieces[0]] if pieces[0] not in vocabulary else []
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def clip_config(tokenizer, **more):
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 12}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes, **ends, **more)


def pipeline_folder(path, kind="sd", prediction="epsilon", **unet):
    """A pipeline of two small blocks over a VAE that halves each side; `kind`: sd, or sdxl with its two encoders and sizes."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )  # fmt: skip
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(path.parent / f"{path.name}-tokenizer")
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=2, sample_size=SIDE,
    )  # fmt: skip
    blocks = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 4,
        "sample_size": SIDE // 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": prediction}
    parts = {"vae": vae, "tokenizer": tokenizer, "scheduler": DDIMScheduler(**schedule, clip_sample=False, steps_offset=1)}
    parts["text_encoder"] = CLIPTextModel(clip_config(tokenizer))
    if kind == "sd":
        parts["unet"] = UNet2DConditionModel(cross_attention_dim=16, **blocks | unet)
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    else:
        sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60}
        parts["unet"] = UNet2DConditionModel(cross_attention_dim=32, **sizes, **blocks | unet)
        second = CLIPTextModelWithProjection(clip_config(tokenizer))
        pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False)
    pipeline.save_pretrained(path)
    return path


def photographs_of_a_thing(folder, count=3, size=(20, 24)):
    """folder/N.png: a red square on noise."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = generator.integers(0, 60, (*size, 3)).astype(np.uint8)
        pixels[5 : 14 + i, 6:15] = (220, 20, 20)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def words(model, data, output, **settings):
    """The words of a short `doratune train`."""
    usual = {
        "objective": "dreambooth", "model": model, "data": data, "output": output, "instance_prompt": "a photo of sks dog",
        "targets": "[to_q, to_k, to_v, to_out.0]", "rank": 2, "lr": 5e-3, "batch_size": 2, "dtype": "float32", "resolution": SIDE,
        "tensorboard": "false", "log_steps": 1, "denoising_steps": 2, "max_steps": 4, "schedule": "constant",
    }  # fmt: skip
    return ["train", *(f"--{name}={value}" for name, value in (usual | settings).items())]
