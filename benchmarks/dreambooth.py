"""DreamBooth on a real, small pipeline: LoRA against DoRA on one shape of one colour that the pipeline has never seen.

    pip install easy-vqa
    python benchmarks/dreambooth.py --output runs/dreambooth --small      # end to end in two minutes; its figures say nothing
    python benchmarks/dreambooth.py --output runs/dreambooth              # about 25 minutes on one core

No pretrained text-to-image model can be had offline, so one is trained first, from nothing: a VAE, then a UNet and a CLIP text
encoder, on easy-vqa's training images (32 × 32 here) with captions from its own questions and answers ("a red circle", or half of
the time "a circle"). Teal triangles are left out. DreamBooth then learns "a sks triangle" from six of them, held to "a triangle"
by images that the pipeline drew itself. Measured on images and noise that no run has seen: the instance loss on other teal
triangles, the prior loss on triangles of the test part, before and after; and how many of the samples of each prompt are teal.
Whatever was finished stays: the same command goes on. OUTPUT/report.html shows the samples; `--result FILE` writes the figures
that docs/text_to_image.md shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from easy_vqa_set import COLOURS, SHAPES, classes, data_folder, image_path, questions_of
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import doratune
from doratune.cli.output import keep_freed_memory
from doratune.comparison.statistics import over_seeds
from doratune.data.image_sets import LabelledImage
from doratune.report.page import build
from doratune.support.environment import environment
from doratune.support.files import read_json, write_json
from doratune.support.folders import whole_folder
from doratune.support.pipelines import load_pipeline
from doratune.training.denoising import Denoiser, StepNoise
from doratune.training.latents import latent_rows, prepared
from doratune.training.painting import paint
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train

SIDE, BATCH, GUIDANCE, THING, WORD = 32, 16, 2.0, ("triangle", "teal"), "sks"
RGB = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128), "green": (0, 255, 0),
    "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip
PROMPTS = {"instance": f"a {WORD} {THING[0]}", "class": f"a {THING[0]}"}
SIZES = {
    False: {"vae": 1200, "base": 3000, "steps": 400, "class": 40, "draws": 8, "held": 48, "pictures": 16, "seeds": 3},
    True: {"vae": 30, "base": 40, "steps": 4, "class": 3, "draws": 1, "held": 4, "pictures": 2, "seeds": 1},
}
"""By --small: steps of each training, class images, noises a held image, held images, samples a prompt, seeds."""


def images(split: str) -> list[tuple[Path, str, str]]:
    """(path, shape, colour) of the images whose questions tell both."""
    data = data_folder()
    told = classes(questions_of(data, split))
    return [(Path(image_path(data, split, image)), *names) for image, names in told.items()]


def tokenizer(folder: Path):
    """CLIP's tokenizer with a token for each word of the captions, and letters for the others."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in ("a", WORD, *SHAPES, *COLOURS):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.append(pieces[0])
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]), encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def start(folder: Path):
    """The pipeline's parts with random numbers."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    words = tokenizer(folder)
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=8, **ends,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=8, sample_size=SIDE, scaling_factor=1.0,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    noise = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return {"vae": vae, "unet": unet, "text_encoder": CLIPTextModel(text), "tokenizer": words, "scheduler": noise}


def train_vae(vae, pixels: torch.Tensor, steps: int) -> None:
    """Reconstruction, and a little of the latents' prior; then the scale that gives them a deviation of 1."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        batch = pixels[torch.randint(len(pixels), (BATCH,), generator=draw)]
        latent = vae.encode(batch).latent_dist
        loss = F.l1_loss(vae.decode(latent.sample(generator=draw)).sample, batch) + 1e-5 * latent.kl().mean() / 1000
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 249 or step == steps - 1:
            print(f"VAE, step {step + 1}: {loss.item():.4f}", flush=True)
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(pixels[:256]).latent_dist.mean.std().item())


def train_base(parts: dict, latents: torch.Tensor, captions: list[tuple[str, str]], steps: int) -> dict:
    """UNet and text encoder together, by the noise's loss; a tenth of the captions empty. The averages of their weights."""
    from diffusers import DDPMScheduler

    network = torch.nn.ModuleDict({part: parts[part] for part in ("unet", "text_encoder")})
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.998 if steps > 1000 else 0.9))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    noising, words = DDPMScheduler.from_config(parts["scheduler"].config), parts["tokenizer"]
    draw, lost = torch.Generator().manual_seed(2), []
    for step in range(steps):
        chosen = torch.randint(len(latents), (BATCH,), generator=draw)
        coins = torch.rand(BATCH, generator=draw)
        said = ["" if coin < 0.1 else captions[i][coin < 0.55] for i, coin in zip(chosen.tolist(), coins.tolist())]
        ids = words(said, padding="max_length", max_length=words.model_max_length, return_tensors="pt").input_ids
        noise, times = torch.randn(latents[chosen].shape, generator=draw), torch.randint(1000, (BATCH,), generator=draw)
        noisy = noising.add_noise(latents[chosen], noise, times)
        loss = F.mse_loss(network["unet"](noisy, times, network["text_encoder"](ids)[0]).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        averaged.update_parameters(network)
        lost.append(loss.item())
        if step % 250 == 249 or step == steps - 1:
            print(f"UNet and text encoder, step {step + 1}: {sum(lost[-250:]) / len(lost[-250:]):.4f}", flush=True)
    return dict(averaged.module.items())


def write_base(folder: Path, sizes: dict) -> None:
    """The pipeline's folder, trained on everything but the thing."""
    from diffusers import StableDiffusionPipeline

    seen = [(path, shape, colour) for path, shape, colour in images("train") if (shape, colour) != THING]
    pixels = torch.stack([prepared(LabelledImage(path.name, "", path).open(), SIDE)[0] for path, *_ in seen])
    parts = start(folder.parent / "tokenizer")
    train_vae(parts["vae"], pixels, sizes["vae"])
    with torch.no_grad():
        latents = torch.cat([parts["vae"].encode(some).latent_dist.mean for some in pixels.split(64)])
        latents *= parts["vae"].config.scaling_factor
    captions = [(f"a {colour} {shape}", f"a {shape}") for _, shape, colour in seen]
    parts |= train_base(parts, latents, captions, sizes["base"])
    pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    with whole_folder(folder, key="model_index.json") as temporary:
        pipeline.save_pretrained(temporary)


def held_losses(pipeline, rows: dict[str, list[dict]], draws: int) -> dict[str, float]:
    """Mean loss of each prompt's held images over as many noises, the same for every model."""
    denoiser, losses = Denoiser(pipeline, False, StepNoise(0)), {}
    for name, some in rows.items():
        batch = {key: torch.stack([row[key] for row in some]) for key in ("mean", "deviation", "sizes")}
        prompts = [row["prompt"] for row in some]
        with torch.no_grad():
            each = [denoiser.errors(**batch, prompts=prompts, generator=torch.Generator().manual_seed(n)) for n in range(draws)]
        losses[name] = torch.stack(each).mean().item()
    return losses


def figure_of(image) -> np.ndarray | None:
    """The figure's colour, (3,) from 0 to 255: the median of what is unlike the border; None where there is no figure."""
    pixels = np.asarray(image).astype(float)
    border = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    figure = pixels[np.abs(pixels - border).max(axis=2) > 70]
    return np.median(figure, axis=0) if len(figure) > 5 else None


def colour_of(image) -> str:
    """The nearest name of the figure's colour."""
    colour = figure_of(image)
    return "none" if colour is None else min(RGB, key=lambda name: np.abs(colour - RGB[name]).sum())


def measured(pipeline, rows: dict, sizes: dict) -> dict:
    """Held losses; of each prompt's samples the share in the thing's colour, and how far their figures are from it, 0 to 1."""
    settings = argparse.Namespace(resolution=SIDE, denoising_steps=20 if sizes["steps"] > 10 else 2, guidance=GUIDANCE)
    figures = {f"{name}_loss": value for name, value in held_losses(pipeline, rows, sizes["draws"]).items()}
    for name, prompt in PROMPTS.items():
        drawn = [paint(pipeline, prompt, settings, 1000 + number) for number in range(sizes["pictures"])]
        figures[f"{name}_in_colour"] = [colour_of(image) for image in drawn].count(THING[1]) / len(drawn)
        apart = [np.abs(colour - RGB[THING[1]]).mean() / 255 for image in drawn if (colour := figure_of(image)) is not None]
        figures[f"{name}_from_colour"] = float(np.mean(apart)) if apart else 1.0
    return figures


def once(path: Path, measure) -> dict:
    """What is measured, or what was."""
    if not path.is_file():
        write_json(path, measure())
    figures = read_json(path, "remove it to measure again")
    print(f"{path.stem}: {figures}", flush=True)
    return figures


def recipe_of(method: str, seed: int, output: Path, sizes: dict, lr: float, rank: int) -> TrainRecipe:
    """One run; the methods differ in nothing else."""
    return TrainRecipe(
        objective="dreambooth", model=str(output / "base"), data=str(output / "thing"), output=str(output / f"{method}-{seed}"),
        instance_prompt=PROMPTS["instance"], instance_token=WORD, class_prompt=PROMPTS["class"], class_images=str(output / "class"),
        class_count=sizes["class"], resolution=SIDE, denoising_steps=20 if sizes["steps"] > 10 else 2, guidance=GUIDANCE,
        method=method, rank=rank, alpha=rank, targets=["to_q", "to_k", "to_v", "to_out.0"], lr=lr, schedule="constant",
        batch_size=4, max_steps=sizes["steps"], save_steps=sizes["steps"], dtype="float32", device="cpu", seed=seed,
        tensorboard=False,
        sample_prompts=[*PROMPTS.values(), "a red circle"], sample_steps=max(1, sizes["steps"] // 2), overwrite=True,
    )  # fmt: skip


def summarized(runs: dict[str, list[dict]]) -> dict:
    """Mean and 95 % interval over seeds of each figure of each method, and of DoRA − LoRA, seed by seed."""
    values = {method: {name: [run[name] for run in some] for name in some[0]} for method, some in runs.items()}
    if {"dora", "lora"} <= values.keys():
        pairs = {name: zip(values["dora"][name], values["lora"][name], strict=True) for name in values["dora"]}
        values["dora - lora"] = {name: [a - b for a, b in some] for name, some in pairs.items()}
    return {method: {name: dataclasses.asdict(over_seeds(v)) for name, v in some.items()} for method, some in values.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/dreambooth"))
    parser.add_argument("--methods", nargs="+", choices=("lora", "dora"), default=["lora", "dora"])
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    output, sizes = arguments.output, SIZES[arguments.small]
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "base" / "model_index.json").is_file():
        write_base(output / "base", sizes)
    things = [path for path, *names in images("train") + images("test") if tuple(names) == THING]
    (output / "thing").mkdir(exist_ok=True)
    for path in things[:6]:
        shutil.copy(path, output / "thing")
    others = [path for path, shape, colour in images("test") if shape == THING[0] and colour != THING[1]]
    base = load_pipeline(str(output / "base"))
    rows = {}
    for name, paths in (("instance", things[6:]), ("class", others)):
        items = [LabelledImage(path.name, name, path) for path in paths[: sizes["held"]]]
        rows[name] = latent_rows(items, [PROMPTS[name]] * len(items), base.vae, SIDE)
    before = once(output / "before.json", lambda: measured(base, rows, sizes))
    runs, folders = {}, []
    for seed in range(1, (arguments.seeds or sizes["seeds"]) + 1):
        for method in arguments.methods:
            run = recipe_of(method, seed, output, sizes, arguments.lr, arguments.rank)
            if not (Path(run.output) / "metrics.json").is_file():
                train(run)
            pipeline = load_pipeline(str(output / "base"))
            doratune.load(pipeline.unet, Path(run.output) / "adapter" / "unet")
            figures = once(output / f"{method}-{seed}.json", lambda pipeline=pipeline: measured(pipeline, rows, sizes))
            runs.setdefault(method, []).append(figures)
            folders.append(Path(run.output))
    build(folders, output / "report.html", analysis="none", overwrite=True)
    counts = {method: json.loads((output / f"{method}-1" / "metrics.json").read_text())["trainable"] for method in runs}
    summary = {"before": before, "runs": runs, "summary": summarized(runs), "trainable": counts}
    print(json.dumps(summary["summary"], indent=2))
    if arguments.result:
        held = {name: len(some) for name, some in rows.items()}
        facts = {"sizes": sizes, "held": held, "lr": arguments.lr, "rank": arguments.rank, "environment": environment()}
        write_json(arguments.result, facts | summary)


if __name__ == "__main__":
    main()
