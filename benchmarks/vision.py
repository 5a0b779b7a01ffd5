"""Full fine-tuning, LoRA, DoRA and magnitude only on real images: easy-vqa's shapes × colours, 24 classes, with intervals.

    pip install easy-vqa
    python benchmarks/vision.py --output runs/vision                    # 3 seeds, no sweep: some minutes on two cores
    python benchmarks/vision.py --output runs/vision --seeds 10 --sweep # each method at its own rate

No pretrained image model can be had offline, so the base is made first: a small ResNet (or `--kind vit`) learns the eight colours
on one half of the training images, all weights. The grid is `doratune compare` on the other half: what shape a figure has besides
its colour, with a new head. The classes are read from the set's own questions and answers. Whatever was finished stays: the same
command goes on. OUTPUT/grid/compare.json holds the figures; `--result FILE` writes those that docs/vision.md shows.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
import transformers
from easy_vqa_set import COLOURS, SHAPES, classes, data_folder, image_path, questions_of

from doratune.cli.output import keep_freed_memory
from doratune.comparison.grid import compare
from doratune.comparison.recipe import CompareRecipe
from doratune.evaluation.evaluate import after_training
from doratune.support.environment import environment
from doratune.support.files import replacing, write_json
from doratune.support.folders import whole_folder
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train

RATES = {"full": 1e-3, "lora": 5e-3, "dora": 5e-3, "magnitude": 2e-2}
SPREAD = (0.3, 1.0, 3.0, 9.0, 27.0)
"""Of a sweep: factors on each method's rate."""


def write_tables(output: Path) -> dict[str, int]:
    """colours.csv and figures.csv (path, label, split): each has one half of the training images, and all test images."""
    data, rows, counts = data_folder(), {"colours": [], "figures": []}, {}
    for split in ("train", "test"):
        told = classes(questions_of(data, split))
        counts[split] = len(told)
        for place, (image, (shape, colour)) in enumerate(told.items()):
            path = image_path(data, split, image)
            if split == "test" or place % 2 == 0:
                rows["colours"].append((path, colour, split))
            if split == "test" or place % 2 == 1:
                rows["figures"].append((path, f"{colour} {shape}", split))
    for name, table in rows.items():
        with replacing(output / f"{name}.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "label", "split"), *table])
    return counts


def write_start(kind: str, folder: Path) -> None:
    """A small model with random numbers and its image processor."""
    torch.manual_seed(0)
    side, labels = 32, {"id2label": dict(enumerate(COLOURS)), "label2id": {name: i for i, name in enumerate(COLOURS)}}
    if kind == "vit":
        sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        config = transformers.ViTConfig(**sizes, image_size=side, patch_size=4, **labels)
        model, size = transformers.ViTForImageClassification(config), {"height": side, "width": side}
        processor = transformers.ViTImageProcessorPil(size=size)
    else:
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, **labels))
        processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": side}, crop_pct=1.0)
    with whole_folder(folder, key="config.json") as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def pretrain(output: Path, kind: str, epochs: float) -> Path:
    """The base model's folder: colours on one half of the images."""
    run = output / f"base-{kind}"
    if not (run / "metrics.json").is_file():
        write_start(kind, output / f"start-{kind}")
        recipe = TrainRecipe(
            model=str(output / f"start-{kind}"), data=str(output / "colours.csv"), tasks=[str(output / "colours.csv")],
            objective="image_classification", method="full", lr=2e-3, epochs=epochs, batch_size=32, dtype="float32",
            output=str(run), overwrite=True, tensorboard=False,
        )  # fmt: skip
        train(recipe, score=after_training(recipe, print))
    return run / "model"


def grid_of(arguments: argparse.Namespace, base: Path) -> CompareRecipe:
    """The grid: the same images, epochs and number of rates for every method."""
    table = str(arguments.output / "figures.csv")
    methods = arguments.methods
    return CompareRecipe(
        settings={
            "model": str(base), "data": table, "tasks": [table], "objective": "image_classification", "targets": "all-layers",
            "rank": arguments.rank, "epochs": arguments.epochs, "batch_size": 32, "dtype": "float32", "tensorboard": False,
        } | ({"eval_size": 200} if arguments.sweep else {}),
        methods=methods,
        variants={"magnitude": {"method": "dora", "targets": [], "magnitude_only": "all-layers"}},
        seeds=list(range(arguments.seeds)),
        method_lrs={m: [float(f"{RATES[m] * f:.3g}") for f in SPREAD] if arguments.sweep else [RATES[m]] for m in methods},
        score="likelihood",
        output=str(arguments.output / "grid"),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/vision"))
    parser.add_argument("--kind", choices=("resnet", "vit"), default="resnet")
    parser.add_argument("--methods", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    arguments.output.mkdir(parents=True, exist_ok=True)
    counts = write_tables(arguments.output)
    base = pretrain(arguments.output, arguments.kind, epochs=4)
    summary = compare(grid_of(arguments, base))
    print(summary.text())
    if arguments.result:
        held = {"kind": arguments.kind, "images": counts, "classes": len(SHAPES) * len(COLOURS), "environment": environment()}
        write_json(arguments.result, held | {"summary": summary.to_dict()})


if __name__ == "__main__":
    main()
