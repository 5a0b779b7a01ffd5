"""LoRA and DoRA on masks of real images: easy-vqa's figures against their background, by shape; one short figure.

    pip install easy-vqa
    python benchmarks/segmentation.py --output runs/segmentation     # about two minutes on one thread

The set has no masks. They are made from the pixels: what is far from the background's colour is the figure, and its class is told
by the set's own questions and answers. No pretrained segmentation model can be had offline, so the base is made first: a small
SegFormer learns the eight colours on one half of the training images, all weights. Each method then learns the three shapes on the
other half, with a new head, and is scored on all test images. One rate a method and no sweep: it says that the parts fit together.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from easy_vqa_set import COLOURS, SHAPES, classes, data_folder
from PIL import Image

from doratune.cli.output import keep_freed_memory
from doratune.evaluation.evaluate import after_training
from doratune.support.environment import environment
from doratune.support.files import read_json, replacing, write_json
from doratune.support.folders import whole_folder
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train

FAR = 40
"""A pixel of the figure differs by more than this from the background, in one of its three channels."""
GROUND = "background"
RATES = {"lora": 1e-2, "dora": 1e-2}


def figure_of(pixels_HW3: np.ndarray) -> np.ndarray:
    """(H, W) where the figure is: what is far from the median colour of the image's border."""
    pixels = pixels_HW3.astype(int)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.abs(pixels - np.median(border, 0)).max(-1) > FAR


def write_masks(output: Path) -> dict[str, int]:
    """colours.csv and shapes.csv (image, mask, split): each has one half of the training images, and all test images."""
    data, rows, counts = data_folder(), {"colours": [], "shapes": []}, {}
    for split in ("train", "test"):
        told = classes(json.loads((data / split / "questions.json").read_text(encoding="utf-8")))
        counts[split] = len(told)
        for place, (image, (shape, colour)) in enumerate(told.items()):
            path = data / split / "images" / f"{image}.png"
            figure = figure_of(np.asarray(Image.open(path).convert("RGB")))
            for kind, number, half in (("colours", COLOURS.index(colour), 0), ("shapes", SHAPES.index(shape), 1)):
                if split == "test" or place % 2 == half:
                    mask = Path("masks") / kind / split / f"{image}.png"
                    (output / mask).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(figure.astype(np.uint8) * (number + 1)).save(output / mask)
                    rows[kind].append((path, mask, split))
    for kind, table in rows.items():
        with replacing(output / f"{kind}.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "mask", "split"), *table])
    return counts


def write_start(folder: Path) -> None:
    """A small SegFormer with random numbers, and its image processor."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "num_attention_heads": [1, 2, 4], "mlp_ratios": [2, 2, 2]}
    strides = {"num_encoder_blocks": 3, "patch_sizes": [7, 3, 3], "strides": [2, 2, 2], "sr_ratios": [4, 2, 1]}
    config = transformers.SegformerConfig(**sizes, **strides, decoder_hidden_size=48, num_labels=len(COLOURS) + 1)
    with whole_folder(folder, key="config.json") as temporary:
        transformers.SegformerForSemanticSegmentation(config).save_pretrained(temporary)
        transformers.SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(temporary)


def run(**settings) -> dict:
    """One training run with its score, or what it left before: the figures of its task."""
    folder = Path(settings["output"])
    if not (folder / "metrics.json").is_file():
        recipe = TrainRecipe(
            objective="semantic_segmentation", batch_size=16, dtype="float32", overwrite=True, tensorboard=False, **settings
        )
        train(recipe, score=after_training(recipe, print))
    metrics = read_json(folder / "metrics.json", "remove the run's folder")
    (result,) = read_json(folder / "scores" / "after" / "results.json", "remove the run's folder")["results"]
    names = ("mean_iou", "pixel_accuracy", "accuracy", "majority", "iou", "total")
    return {"trainable": metrics["trainable"], "seconds": metrics["seconds"]} | {name: result[name] for name in names}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/segmentation"))
    parser.add_argument("--methods", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    counts = write_masks(output)
    if not (output / "start" / "config.json").is_file():
        write_start(output / "start")
    tables = {kind: str(output / f"{kind}.csv") for kind in ("colours", "shapes")}
    figures = {"base, colours": run(
        model=str(output / "start"), data=tables["colours"], tasks=[tables["colours"]], class_names=[GROUND, *COLOURS],
        method="full", lr=2e-3, epochs=3, output=str(output / "base"),
    )}  # fmt: skip
    for method in arguments.methods:
        figures[method] = run(
            model=str(output / "base" / "model"), data=tables["shapes"], tasks=[tables["shapes"]],
            class_names=[GROUND, *SHAPES], method=method, targets="all-layers", rank=4, lr=RATES[method], epochs=2,
            seed=arguments.seed, output=str(output / method),
        )  # fmt: skip
    for name, row in figures.items():
        print(f"{name}: mean IoU {100 * row['mean_iou']:.1f} %, pixels {100 * row['pixel_accuracy']:.1f} %")
    if arguments.result:
        write_json(arguments.result, {"images": counts, "figures": figures, "environment": environment()})


if __name__ == "__main__":
    main()
