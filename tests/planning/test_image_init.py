"""doratune init for models that read images: recipes that run as they are, by what the model and its data are."""

import image_models
import mask_models
import numpy as np
import pictures
import pytest
import yaml

from doratune.cli.main import main
from doratune.planning.image_start import image_facts
from doratune.planning.start import DataFacts, RunWish, start_of


def image_text(family, folder):
    pictures.model_folder(folder / "model", family)
    pictures.image_folder(folder / "images")
    pictures.write_items(folder / "data.json", pictures.llava_items(16))
    return "data.json", ["--images", "images"]


def class_folder(kind, folder):
    image_models.image_model(kind, folder / "model")
    image_models.photographs(folder / "photos", count=4)
    return "photos", []


def class_table(kind, folder):
    image_models.image_model(kind, folder / "model", body=True)
    image_models.photographs(folder / "photos", count=4)
    rows = [f"photos/{colour}/{i}.png,{colour}" for colour in image_models.COLOURS for i in range(4)]
    (folder / "scans.csv").write_text("\n".join(["path,finding", *rows, "photos/nothing.png,"]))
    return "scans.csv", ["--columns", "{image: path, label: finding}"]


def class_arrays(kind, folder):
    image_models.image_model(kind, folder / "model")
    draw = np.random.default_rng(0)
    arrays = {f"{part}_images": draw.integers(0, 255, (12, 20, 20), dtype=np.uint8) for part in ("train", "val")}
    np.savez(folder / "scans.npz", **arrays, **{f"{part}_labels": np.arange(12)[:, None] % 3 for part in ("train", "val")})
    return "scans.npz", []


def masks(kind, folder):
    mask_models.mask_model(kind, folder / "model", body=True)
    mask_models.scenes(folder / "photos", count=8)
    return "photos", []


CASES = [
    (image_text, "llava", {"projector": "whole", "whole_lr_ratio": 0.1, "vision_tower": "frozen", "images": "images"}),
    (class_folder, "vit", {"objective": "image_classification", "targets": "all-layers"}),
    (class_table, "resnet", {"objective": "image_classification", "bad_items": "skip", "checkpointing": "none"}),
    (class_arrays, "convnext", {"objective": "image_classification", "eval_data": "scans.npz", "best_by": "loss"}),
    (masks, "segformer", {"objective": "semantic_segmentation", "rank": 9}),
]


@pytest.mark.parametrize(("data", "kind", "expected"), CASES, ids=[f"{kind}, {data.__name__}" for data, kind, _ in CASES])
def test_the_recipe_runs_as_it_is(data, kind, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, more = data(kind, tmp_path)
    assert main(["init", source, "--model", "model", "--memory", "2", "--device", "cpu", "--output", "recipe.yaml", *more]) == 0
    text = (tmp_path / "recipe.yaml").read_text()
    recipe = yaml.safe_load(text)
    assert expected.items() <= recipe.items() and "GiB planned of 2" in text
    for name in ("rank", "targets", "lr", "batch_size", "epochs", "checkpointing"):
        lines = text.splitlines()
        assert lines[next(i for i, line in enumerate(lines) if line.startswith(f"{name}:")) - 1].startswith("# "), name
    assert main(["train", "recipe.yaml", "--max_steps", "1", "--rank", "2", "--dtype", "float32"]) == 0
    assert (tmp_path / recipe["output"] / "adapter" / "adapter_config.json").is_file()


def test_the_images_of_an_example_count(tmp_path):
    pictures.model_folder(tmp_path / "model")
    plans = [start_of(RunWish(str(tmp_path / "model"), 2, "cpu"), DataFacts(100, 60, 60, images=n)).plan for n in (0, 1, 3)]
    assert [plan.settings.image_count for plan in plans] == [0, 1, 3]
    assert plans[0].total < plans[1].total < plans[2].total


@pytest.mark.parametrize(
    ("data", "kind", "words", "message"),
    [
        (class_folder, "vit", ["--data", "nowhere"], "nowhere"),
        (class_folder, "vit", ["--memory", "0.001"], "one image of 16 x 16 at a time with checkpointing, needs"),
        (class_folder, "resnet", ["--memory", "0.001"], "one image of 16 x 16 at a time, needs"),
        (image_text, "llava", ["--max_length", "12"], "max_length is 12, and 1 image of model take 16 tokens"),
        (masks, "segformer", ["--data", "model"], "model holds no images in folders of classes"),
    ],
)
def test_what_is_refused_is_one_line_and_nothing_is_written(data, kind, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, more = data(kind, tmp_path)
    settings = {"--data": source, "--memory": "2"} | dict(zip(words[::2], words[1::2]))
    words = [word for pair in settings.items() for word in pair]
    assert main(["init", "--model", "model", "--device", "cpu", "--output", "recipe.yaml", *words, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "recipe.yaml").exists()


def test_language_models_are_none_of_these(tiny_folder):
    from doratune.planning.configs import config_of

    assert image_facts(str(tiny_folder), ["x"], config_of(str(tiny_folder)), {}, print) is None
