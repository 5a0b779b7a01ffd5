"""Training models of images and text: what is trained and what is frozen, a step, resume, save, load, merge, evaluate."""

import json
import math

import pytest
import torch
import yaml
from pictures import FAMILIES, image_folder, llava_items, model_folder, write_items
from PIL import Image
from safetensors.torch import load_file

import doratune
from doratune.cli.main import main
from doratune.data.image_reader import load_reader
from doratune.data.image_sources import ImageSource
from doratune.errors import UserError
from doratune.evaluation.evaluate import evaluate
from doratune.evaluation.tasks import load_task
from doratune.support.image_text import parts_of
from doratune.support.models import dense_parts, load_model
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train

SETTINGS = {"rank": 2, "lr": 0.01, "max_steps": 2, "batch_size": 4, "dtype": "float32", "tensorboard": False, "log_steps": 1}


@pytest.fixture(scope="module", params=FAMILIES)
def place(request, tmp_path_factory):
    """A folder with a model, images and data."""
    path = tmp_path_factory.mktemp(request.param.replace("-", "_"))
    model_folder(path / "model", request.param)
    image_folder(path / "images")
    write_items(path / "train.json", llava_items(12))
    return path


def recipe(place, output="run", **changes):
    data = {"model": str(place / "model"), "data": str(place / "train.json"), "images": str(place / "images")}
    return TrainRecipe(**data | SETTINGS | {"output": str(place / output), "overwrite": True} | changes)


def adapted(folder):
    return {key.partition(".lora_")[0] for key in load_file(folder / "adapter_model.safetensors") if ".lora_A" in key}


@pytest.mark.parametrize("method", ["dora", "lora", "dvora"])
def test_adapters_are_on_the_language_model_alone(place, method):
    metrics = train(recipe(place, f"run-{method}", method=method), say=lambda line: None)
    assert metrics["steps"] == 2 and metrics["final_loss"] > 0
    model = load_model(str(place / "model"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    parts = parts_of(model)
    doratune.load(model, place / f"run-{method}" / "adapter")
    names = [name for name, _ in doratune.adapters(model)]
    assert len(names) == 14 and all(name.startswith(parts.language) for name in names)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items() if name in now)


def test_the_projector_is_trained_whole_where_the_recipe_says_so(place):
    train(recipe(place, "whole", projector="whole"), say=lambda line: None)
    model = load_model(str(place / "model"))
    parts = parts_of(model)
    before = {name: p.clone() for name, p in model.named_parameters() if name.startswith(parts.projector)}
    tower = {name: p.clone() for name, p in model.named_parameters() if name.startswith(parts.vision)}
    doratune.load(model, place / "whole" / "adapter")
    now = dict(model.named_parameters())
    assert before and all(not torch.equal(now[name], p) for name, p in before.items())
    assert tower and all(torch.equal(now[name], p) for name, p in tower.items())


def test_the_projector_has_a_rate_of_its_own(place):
    """At a rate of zero it stays, while the adapters move; the groups say so."""
    metrics = train(recipe(place, "rates", projector="whole", whole_lr_ratio=0.0), say=lambda line: None)
    model = load_model(str(place / "model"))
    parts = parts_of(model)
    before = {name: p.clone() for name, p in model.named_parameters() if name.startswith(parts.projector)}
    doratune.load(model, place / "rates" / "adapter", trainable=True)
    assert metrics["direction_moved"] > 0
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())
    groups = {group["name"]: group["lr"] for group in doratune.parameter_groups(model, lr=2e-4, whole_lr_ratio=0.1)}
    assert groups["whole"] == pytest.approx(2e-5) and groups["factors"] == 2e-4
    with pytest.raises(UserError, match="whole_lr_ratio is -1"):
        doratune.parameter_groups(model, whole_lr_ratio=-1)


def test_the_image_tower_is_adapted_where_the_recipe_says_so(place):
    train(recipe(place, "tower", vision_tower="adapted"), say=lambda line: None)
    model = load_model(str(place / "model"))
    parts = parts_of(model)
    doratune.load(model, place / "tower" / "adapter")
    assert any(name.startswith(parts.vision) for name, _ in doratune.adapters(model))


@pytest.mark.parametrize("exclude", [["o_proj"], "(.*o_proj)"])
def test_what_is_excluded_stays_excluded(place, exclude):
    train(recipe(place, "less", exclude=exclude, max_steps=1), say=lambda line: None)
    model = load_model(str(place / "model"))
    doratune.load(model, place / "less" / "adapter")
    names = [name for name, _ in doratune.adapters(model)]
    assert len(names) == 12 and not any(name.endswith("o_proj") for name in names)


def test_full_fine_tuning_leaves_the_image_tower_alone(place):
    metrics = train(recipe(place, "full", method="full", projector="whole", dtype="bfloat16"), say=lambda line: None)
    base, tuned = load_model(str(place / "model")), load_model(str(place / "full" / "model"))
    parts, now = parts_of(base), dict(tuned.named_parameters())
    tower = sum(p.numel() for name, p in base.named_parameters() if name.startswith(parts.vision))
    assert metrics["total"] - metrics["trainable"] == tower
    same = {name: torch.equal(p, now[name]) for name, p in base.named_parameters()}
    assert all(same[name] for name in same if name.startswith(parts.vision))
    assert not any(same[name] for name in same if name.startswith(parts.projector) and name.endswith("weight"))


@pytest.mark.parametrize("method", ["series", "parallel", "prefix"])
def test_baselines_train(place, method):
    metrics = train(recipe(place, f"base-{method}", method=method, baseline_size=2, max_steps=1), say=lambda line: None)
    assert metrics["steps"] == 1


def test_a_resumed_run_is_the_run_in_one_piece(place):
    whole = train(recipe(place, "one", epochs=2, max_steps=-1, save_steps=2), say=lambda line: None)
    assert whole["steps"] == 6
    train(recipe(place, "two", epochs=2, max_steps=-1, save_steps=2, keep_checkpoints=9), say=lambda line: None)
    for step in (4, 6):
        remove(place / "two" / f"checkpoint-{step}")
    (place / "two" / "metrics.json").unlink()
    resumed = recipe(place, "two", epochs=2, max_steps=-1, save_steps=2, keep_checkpoints=9, resume=True, overwrite=False)
    train(resumed, say=lambda line: None)
    a, b = (load_file(place / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def remove(folder):
    import shutil

    shutil.rmtree(folder)


def task_file(place):
    items = [
        {"image": f"{colour}.png", "question": "What colour is it?", "answer": colour}
        for colour in ("red", "green", "blue", "white", "red", "green", "white", "blue", "red")
    ]
    items[4] = {"image": None, "question": "Say yes", "answer": "yes"}
    items[5]["question"] = "What colour is the picture here, in one word or two?"
    return write_items(place / "colours.json", items)


def test_merge_and_evaluate_from_the_command_line(place, capsys):
    """The merged folder opens with AutoModelForImageTextToText and answers as base and adapter do, at batch 1 and 8."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    flags = ["--model", place / "model", "--data", place / "train.json", "--images", place / "images", "--projector", "whole"]
    flags += ["--rank", 2, "--lr", 0.01, "--max_steps", 8, "--batch_size", 4, "--dtype", "float32", "--tensorboard", "false"]
    assert main(["train", *map(str, flags), "--output", str(place / "cli")]) == 0
    adapter, merged = str(place / "cli" / "adapter"), place / "merged"
    assert main(["merge", "--model", str(place / "model"), "--adapter", adapter, "--output", str(merged)]) == 0
    AutoProcessor.from_pretrained(place / "cli" / "adapter")
    task_file(place)
    (place / "images").rename(place / "pictures")
    (place / "pictures").rename(place / "images")
    records = {}
    for name, model in (("adapter", ["--model", place / "model", "--adapter", adapter]), ("merged", ["--model", merged])):
        for size in (1, 8):
            output = place / f"eval-{name}-{size}"
            options = [*model, "--task", place / "colours.json", "--batch_size", size, "--output", output, "--max_new_tokens", 6]
            assert main(["evaluate", *map(str, options)]) == 0
            records[name, size] = (output / "colours.generate.jsonl").read_text()
    assert len(set(records.values())) == 1
    capsys.readouterr()
    assert AutoProcessor.from_pretrained(merged).image_processor is not None
    model = AutoModelForImageTextToText.from_pretrained(merged).eval()
    base = load_model(str(place / "model"))
    doratune.load(base, adapter)
    doratune.merge(base)
    now = dict(model.named_parameters())
    assert all(torch.allclose(p, now[name], atol=1e-6) for name, p in base.named_parameters() if name in now)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_decide_what_is_learned(tmp_path, family):
    """After some steps the model names the colours that it was shown, and ends its answers where the template does."""
    model_folder(tmp_path / "model", family)
    image_folder(tmp_path / "images", [(16, 16)] * 4)
    items = [item for item in llava_items(64) if "image" in item]
    write_items(tmp_path / "train.json", items)
    settings = {"projector": "whole", "max_steps": 80, "lr": 0.01, "rank": 8, "log_steps": 20, "also_train": ["lm_head"]}
    metrics = train(recipe(tmp_path, **settings), say=lambda line: None)
    assert metrics["final_loss"] < 0.2
    asked = {"question": "What colour is it?", "prompt": "What colour is it?"}
    write_items(tmp_path / "colours.json", [asked | {"image": f"{c}.png", "answer": c} for c in ("red", "green", "blue")])
    model, reader = load_model(str(tmp_path / "model")), load_reader(str(tmp_path / "model"))
    doratune.load(model, tmp_path / "run" / "adapter")
    result = evaluate(model, reader, [load_task(str(tmp_path / "colours.json"))], ["generate"], batch_size=3)["results"][0]
    assert result["accuracy"] == 1.0 and result["majority"] == pytest.approx(1 / 3)


def test_tasks_are_scored_after_a_training_and_data_may_be_streamed(place):
    write_items(place / "train.jsonl", llava_items(12))
    task_file(place)
    run = {"data": str(place / "train.jsonl"), "streaming": True, "tasks": [str(place / "colours.json")], "tasks_batch_size": 4}
    metrics = train_with_tasks(recipe(place, "tasks", tasks_protocol="generate", **run))
    result = json.loads((place / "tasks" / "scores" / "after" / "results.json").read_text())["results"][0]
    assert metrics["steps"] == 2 and result["total"] == 9 and 0 <= result["accuracy"] <= 1


def train_with_tasks(settings):
    from doratune.evaluation.evaluate import after_training

    return train(settings, say=lambda line: None, score=after_training(settings, lambda line: None))


def test_prompts_of_text_are_generated_in_the_processors_template(place, tmp_path, capsys):
    """Through `doratune generate`: the question is in the prompt, and an image is refused."""
    turns = [{"role": "user", "content": "What colour is the sky?"}]
    write_items(tmp_path / "prompts.jsonl", [{"messages": turns}])
    options = [
        "--model",
        place / "model",
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--output",
        tmp_path / "out.jsonl",
        "--max_new_tokens",
        3,
    ]
    assert main(["generate", *map(str, options)]) == 0
    reader = load_reader(str(place / "model"))
    from doratune.generation.prompts import rendered

    ids = rendered({"messages": turns}, reader)
    assert "What colour is the sky?" in reader.decode(ids) and ids == reader.question("What colour is the sky?", [])
    write_items(tmp_path / "prompts.jsonl", [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}])
    assert main(["generate", *map(str, options), "--overwrite"]) == 2
    capsys.readouterr()
    with pytest.raises(UserError, match="a prompt with an image"):
        rendered({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, reader)


def test_settings_that_do_not_fit_are_one_line(place, tiny_folder):
    quiet = {"say": lambda line: None}
    for changes, words in (
        ({"model": str(tiny_folder), "data": "demo", "images": None, "projector": "whole"}, "for models of images and text"),
        (
            {"model": str(tiny_folder), "data": "demo", "images": None, "vision_tower": "adapted"},
            "for models of images and text",
        ),
        ({"model": str(tiny_folder)}, "reads text alone"),
        ({"packing": True}, "packing: rows of several examples"),
        ({"images": str(place / "nothing")}, "which is no folder"),
        ({"data": str(place / "broken.json")}, "nobody.png: no such image file"),
    ):
        write_items(place / "broken.json", [*llava_items(2), llava_items(1)[0] | {"image": "nobody.png"}])
        with pytest.raises(UserError) as stop:
            train(recipe(place, "refused", **changes), **quiet)
        assert words in str(stop.value) and "\n" not in str(stop.value)
        assert not (place / "refused" / "adapter").exists()


def test_memory_is_planned_with_the_images(place, capsys):
    words = ["plan", "--model", str(place / "model"), "--data", str(place / "train.json"), "--memory", "24", "--largest", "none"]
    assert main([*words, "--rank", "4", "--batch_size", "2"]) == 0
    assert "2 x 512 tokens, 1 image of " in capsys.readouterr().out


def test_broken_images_are_skipped_and_counted_where_the_recipe_says_so(place):
    items = [*llava_items(7), llava_items(1)[0] | {"image": "nobody.png"}, llava_items(1)[0] | {"image": []}]
    write_items(place / "some.json", items)
    lines = []
    metrics = train(recipe(place, "some", data=str(place / "some.json"), bad_items="skip"), say=lines.append)
    assert metrics["data"]["training"]["unusable"] == 2 and metrics["examples"] == 7
    assert any("2 unusable items skipped" in line for line in lines)


def test_an_evaluation_of_broken_or_missing_images_is_one_line(place, tiny_folder, capsys):
    write_items(place / "lost.json", [{"image": "nobody.png", "question": "?", "answer": "red"}])
    for model, words in ((place / "model", "lost.json: item 1: "), (tiny_folder, "reads text alone")):
        options = ["--model", model, "--task", place / "lost.json", "--output", place / "lost"]
        assert main(["evaluate", *map(str, options)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in error, error
        assert not (place / "lost").exists()


def test_a_quantized_base_keeps_what_stands_beside_the_language_model(place):
    pytest.importorskip("bitsandbytes")
    skipped = dense_parts(str(place / "model"))
    metrics = train(recipe(place, "nf4", quantize="nf4", projector="whole"), say=lambda line: None)
    assert metrics["steps"] == 2
    model = load_model(str(place / "model"), "float32", "nf4")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}
    assert all((kind == "Linear4bit") != name.startswith(skipped) for name, kind in kinds.items())
    assert "Linear4bit" in kinds.values() and "Linear" in kinds.values()


def test_a_quantized_result_is_merged_with_its_processor(place):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    pytest.importorskip("bitsandbytes")
    train(recipe(place, "q", quantize="nf4", max_steps=1), say=lambda line: None)
    options = ["--adapter", place / "q" / "adapter", "--output", place / "q-merged", "--dtype", "float32"]
    assert main(["merge", "--model", *map(str, [place / "model", *options])]) == 0
    assert AutoProcessor.from_pretrained(place / "q-merged").image_processor is not None
    model = AutoModelForImageTextToText.from_pretrained(place / "q-merged")
    assert not any("4bit" in type(module).__name__ for module in model.modules())


def test_prompts_are_answered_while_it_trains(place):
    lines = []
    train(recipe(place, "samples", sample_prompts=["What colour is the sky?"], max_steps=1), say=lines.append)
    assert any(line.startswith("step 1: 'What colour is the sky?' -> ") for line in lines)


def test_llava_7b_by_counting():
    """The paper's Table 4 says 4.61 % for LoRA and 4.63 % for DoRA: adapter and projector over all numbers, the adapter's own among
    them, cut to two digits."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32000)))
    parts = parts_of(model)
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(parts.language)]
    assert len(layers) == 7 * 32
    projector = sum(p.numel() for n, p in model.named_parameters() if n.startswith(parts.projector))
    total = sum(p.numel() for p in model.parameters())
    lora = sum(128 * (m.in_features + m.out_features) for m in layers)
    magnitudes = sum(m.out_features for m in layers)
    shares = [100 * (trained + projector) / (total + trained) for trained in (lora, lora + magnitudes)]
    assert (lora, magnitudes, projector) == (319_815_680, 1_359_872, 20_979_712)
    assert [math.floor(100 * share) / 100 for share in shares] == [4.61, 4.63]


@pytest.mark.parametrize("size", [(40, 20), (12, 30), (16, 16)])
def test_a_processor_that_pads_shows_the_whole_image_on_its_mean_colour(size, tmp_path):
    """LLaVA's `image_aspect_ratio pad`, as docs/vision_language.md sets it in the model's folder."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    model, processor = FAMILIES["llava"]()
    square = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor.image_processor = LlavaImageProcessorPil(do_pad=True, **square)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "red.png")
    reader = load_reader(str(tmp_path / "model"))
    pixels = reader.inputs([[ImageSource(str(tmp_path / "red.png"), "red.png")]])["pixel_values"][0]
    assert pixels.shape == (3, 16, 16) and len(reader.expansion(size)) == 16
    red = (pixels[0] > 1).float()
    expected = min(size) / max(size)  # the share of the square that the image covers, its borders blurred
    assert red.mean() == pytest.approx(expected, abs=0.15) and red[8, 8] == 1
    if size[0] != size[1]:
        assert pixels[:, 0, 0].abs().max() < 0.05  # the mean colour, normalized


def test_the_recipe_has_the_settings_of_llava_s_script(pytestconfig):
    """finetune_lora as it is published, flag by flag."""
    settings = yaml.safe_load((pytestconfig.rootpath / "recipes" / "llava.yaml").read_text())
    said = {"rank": 128, "alpha": 256, "lr": 2e-4, "schedule": "cosine", "epochs": 1, "max_length": 2048, "dtype": "bfloat16"}
    assert said.items() <= settings.items() and settings.get("weight_decay", 0) == 0
    assert settings["checkpointing"] != "none" and settings.get("group_by_length", True)
    assert settings["lr"] * settings["whole_lr_ratio"] == pytest.approx(2e-5) and settings["projector"] == "whole"
    together = settings["batch_size"] * settings["gradient_accumulation"]
    assert together == 16 * 2 * 4 and settings["warmup_steps"] == round(0.03 * 665_298 / together)
    from transformers import LlavaConfig

    assert LlavaConfig().vision_feature_layer == -2  # mm_vision_select_layer
