"""Full fine-tuning, LoRA and DoRA of a small VL-BART on easy-vqa's real images: four tasks in one run, with intervals.

    pip install easy-vqa
    python benchmarks/vl_bart.py --output runs/vl_bart                        # 3 seeds, no sweep
    python benchmarks/vl_bart.py --output runs/vl_bart --test_items 9673 --sweep    # all test questions, the best of four rates
    python benchmarks/vl_bart.py --output runs/small --items 60 --epochs 1 --seeds 1 --steps 20 --start_epochs 0.1   # do they fit?

No pretrained model can be had offline, so each is made first, of the training images alone: an image tower that learns their 24
classes (shape × colour), a BART that learns to write the set's questions and captions whole where words are masked, and then to
caption the images (all weights): the base. The grid is `doratune compare` on four tasks: the set's own questions, pairs of images
("the same shape"), captions, and films of two to four of its images (what comes first, how many there are). OUTPUT/base holds the
base's own scores, OUTPUT/grid/compare.json the figures and OUTPUT/grid/analysis the scatter of q and v over four checkpoints
(Fig. 2). Whatever was finished stays: the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from easy_vqa_set import classes, data_folder, image_path, questions_of, words_of
from vision import write_start

from doratune.cli.main import main as doratune
from doratune.cli.output import keep_freed_memory
from doratune.comparison.grid import compare
from doratune.comparison.recipe import CompareRecipe
from doratune.support.environment import environment
from doratune.support.files import replacing, write_json
from doratune.support.folders import whole_folder
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train

RATES = {"full": 5e-4, "lora": 3e-3, "dora": 3e-3}
SPREAD = (0.3, 1.0, 3.0, 9.0)
"""Of a sweep: factors on each method's rate."""
TASKS = ("vqa", "nlvr", "caption", "tvqa")
SCORED = ("vqa", "nlvr", "tvqa")
"""What ranks the methods: of captions, CIDEr is no share that could be averaged with the others'."""
WIDTH, LAYERS = 96, 2
CHECKPOINTS = 4


def items_of(split: str, output: Path, most: int) -> dict[str, list[dict]]:
    """At most so many items of each task, of the images whose questions tell shape and colour."""
    data, draw = data_folder(), random.Random(0)
    questions = questions_of(data, split)
    told = classes(questions)
    images = list(told)

    def path(image: int) -> str:
        return image_path(data, split, image)

    asked = [{"task": "vqa", "image": path(i), "question": q, "answer": a} for q, a, i in questions]
    captions = [
        {"task": "caption", "image": path(i), "answers": [f"a {colour} {shape}", f"one {shape} in {colour}"]}
        for i, (shape, colour) in told.items()
    ]
    pairs = []
    for n in range(len(images)):
        one = draw.choice(images)
        alike = [image for image in draw.sample(images, min(60, len(images))) if (told[image][0] == told[one][0]) == (n % 2 == 0)]
        other = alike[0] if alike else one
        same = "true" if told[one][0] == told[other][0] else "false"
        pairs.append({"task": "nlvr", "images": [path(one), path(other)], "question": "the same shape", "answer": same})
    lists = {
        "vqa": asked,
        "nlvr": pairs,
        "caption": captions,
        "tvqa": list(films(told, data / split, output / f"films_{split}", draw, most)),
    }
    return {task: draw.sample(items, min(most, len(items))) for task, items in lists.items()}


def films(told: dict, data: Path, folder: Path, draw: random.Random, most: int) -> Iterator[dict]:
    """Folders of two to four frames, with a question each."""
    images = list(told)
    for n in range(min(most, len(images))):
        frames = draw.sample(images, draw.randint(2, 4))
        place = folder / str(n)
        place.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(frames):
            if not (place / f"{number}.png").exists():
                shutil.copyfile(data / "images" / f"{image}.png", place / f"{number}.png")
        shape, colour = told[frames[0]]
        question, answer = draw.choice(
            [("what shape is first?", shape), ("what color is first?", colour), ("how many pictures?", str(len(frames)))]
        )
        yield {"task": "tvqa", "video": str(place), "question": question, "answer": answer}


def write_data(output: Path, most: int, tested: int | None = None) -> dict[str, dict[str, int]]:
    """train.json, captions.json, and TASK.json of the test images; how many items each holds. tested: at most, of each task."""
    counts = {}
    for split in ("train", "test"):
        items = items_of(split, output, most if split == "train" else tested or max(most // 4, 20))
        counts[split] = {task: len(part) for task, part in items.items()}
        if split == "train":
            write_json(output / "train.json", [item for part in items.values() for item in part])
            write_json(output / "captions.json", items["caption"])
        else:
            for task, part in items.items():
                write_json(output / f"{task}.json", part)
    return counts


def write_tower(output: Path, epochs: float) -> Path:
    """The image tower's folder: a small ResNet that tells the 24 classes of the training images."""
    run = output / "tower"
    if not (run / "metrics.json").is_file():
        data = data_folder()
        told = classes(questions_of(data, "train"))
        with replacing(output / "classes.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            rows = [(image_path(data, "train", i), f"{colour} {shape}") for i, (shape, colour) in told.items()]
            csv.writer(file).writerows([("path", "label"), *rows])
        write_start("resnet", output / "start-tower")
        settings = {"objective": "image_classification", "method": "full", "lr": 2e-3, "epochs": epochs, "batch_size": 32}
        train(recipe(run, model=str(output / "start-tower"), data=str(output / "classes.csv"), **settings))
    return run / "model"


def recipe(run: Path, **settings) -> TrainRecipe:
    return TrainRecipe(output=str(run), overwrite=True, tensorboard=False, dtype="float32", **settings)


def write_bart(output: Path, steps: int) -> Path:
    """A small BART that writes the training texts whole where three words in ten are masked."""
    folder = output / "bart"
    if folder.is_dir():
        return folder
    texts = [
        text
        for item in json.loads((output / "train.json").read_text(encoding="utf-8"))
        for text in (*item.get("answers", ()), f"{item.get('question', '')} {item.get('answer', '')}".strip())
        if text
    ]
    tokenizer = words_of([*texts, *(f"{task}:" for task in TASKS)])
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "max_position_embeddings": 64, "dropout": 0.0}
    sizes |= {
        "encoder_ffn_dim": 4 * WIDTH,
        "decoder_ffn_dim": 4 * WIDTH,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=len(tokenizer), **sizes, **ends))
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-3), random.Random(0)
    for step in range(steps):
        whole = tokenizer([f"<s> {text} </s>" for text in draw.choices(texts, k=32)], return_tensors="pt", padding=True)
        ids, mask = whole["input_ids"], whole["attention_mask"]
        hidden = (torch.rand(ids.shape) < 0.3) & (ids > 4)
        loss = model(input_ids=ids.masked_fill(hidden, 4), attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"BART, step {step}: loss {loss.item():.3f}")
    with whole_folder(folder, key="config.json") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def shared_settings(output: Path, tower: Path) -> dict:
    """What every run of VL-BART here has."""
    seen = {"image_tower": str(tower), "features": str(output / "features"), "cells": 4, "frames": 4}
    return seen | {"objective": "vl_bart", "batch_size": 32, "max_length": 48}


def write_base(output: Path, bart: Path, tower: Path, epochs: float) -> Path:
    """The VL-BART that the grid begins with: it captions the training images."""
    run = output / "captions"
    if not (run / "metrics.json").is_file():
        settings = shared_settings(output, tower) | {"method": "full", "lr": 1e-3, "epochs": epochs}
        train(recipe(run, model=str(bart), data=str(output / "captions.json"), **settings))
    return run / "model"


def grid_of(arguments: argparse.Namespace, base: Path, tower: Path, rows: int) -> CompareRecipe:
    """The grid: the same items, epochs and number of rates for every method; four checkpoints a run."""
    output, norms = arguments.output, ["layernorm_embedding", "self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]
    steps = max(CHECKPOINTS, round(arguments.epochs * rows / 32) // CHECKPOINTS * CHECKPOINTS)
    settings = shared_settings(output, tower) | {
        "model": str(base), "data": str(output / "train.json"), "tasks": [str(output / f"{task}.json") for task in SCORED],
        "tasks_protocol": "generate", "targets": ["q_proj", "v_proj"], "rank": arguments.rank, "projector": "whole",
        "max_steps": steps, "save_steps": steps // CHECKPOINTS, "keep_checkpoints": CHECKPOINTS,
        "dtype": "float32", "tensorboard": False,
    }  # fmt: skip
    whole = {"also_train": norms}
    return CompareRecipe(
        settings=settings | ({"eval_size": 200} if arguments.sweep else {}),
        methods=list(RATES),
        variants={"lora": {"method": "lora"} | whole, "dora": {"method": "dora"} | whole},
        seeds=list(range(arguments.seeds)),
        method_lrs={m: [float(f"{rate * f:.3g}") for f in SPREAD] if arguments.sweep else [rate] for m, rate in RATES.items()},
        score="generate",
        analyze=["q_proj", "v_proj"],
        output=str(output / "grid"),
    )


def score_base(output: Path, base: Path) -> None:
    """The base's own answers to the tasks."""
    if not (output / "base" / "results.json").is_file():
        tasks = json.dumps([str(output / f"{task}.json") for task in TASKS])
        words = ["--model", str(base), "--task", tasks, "--output", str(output / "base")]
        doratune(["evaluate", *words, "--features", str(output / "features")])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/vl_bart"))
    parser.add_argument("--items", type=int, default=4000, help="of each task")
    parser.add_argument("--test_items", type=int, help="of each task; default a quarter as many")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--start_epochs", type=float, default=8, help="of the image tower and of the base's captions")
    parser.add_argument("--steps", type=int, default=800, help="of BART on text")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    arguments.output.mkdir(parents=True, exist_ok=True)
    counts = write_data(arguments.output, arguments.items, arguments.test_items)
    tower = write_tower(arguments.output, arguments.start_epochs)
    bart = write_bart(arguments.output, arguments.steps)
    base = write_base(arguments.output, bart, tower, arguments.start_epochs)
    score_base(arguments.output, base)
    rows = sum(counts["train"].values()) + counts["train"]["caption"]
    summary = compare(grid_of(arguments, base, tower, rows))
    print(summary.text())
    if arguments.result:
        own = json.loads((arguments.output / "base" / "results.json").read_text(encoding="utf-8"))["results"]
        held = {"items": counts, "base": own, "environment": environment()}
        write_json(arguments.result, held | {"summary": summary.to_dict()})


if __name__ == "__main__":
    main()
