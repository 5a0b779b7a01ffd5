"""Images, prompts, pipelines and settings that DreamBooth cannot train on; images of all kinds; SDXL's and SD 1.5's real shapes."""

import json
import math
import shutil

import pytest
import torch
from image_models import image_model
from PIL import Image
from pipelines import SIDE, photographs_of_a_thing, pipeline_folder, words

from doratune.adapter.targets import select
from doratune.checkpoint.fitting import needed
from doratune.cli.arguments import parse
from doratune.cli.main import main
from doratune.training.latents import prepared
from doratune.training.recipe import TrainRecipe

pytest.importorskip("diffusers")
UNETS = {
    "dreambooth_sdxl": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 2048,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "dreambooth_sd15": {"sample_size": 64, "cross_attention_dim": 768},
}  # fmt: skip
"""The published configs."""
COUNTS = {"dreambooth_sdxl": (2_567_463_684, 560, 12_277_760, 11_612_160), "dreambooth_sd15": (859_520_964, 128, 897_024, 797_184)}
"""Numbers of the UNet, adapted layers, trained numbers of DoRA and of LoRA, at the recipe's rank."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs_of_a_thing(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pipeline_folder(tmp_path_factory.mktemp("base") / "sd")


@pytest.mark.parametrize("name", UNETS)
def test_the_recipes_trained_share_on_the_real_shapes(name, pytestconfig):
    from diffusers import UNet2DConditionModel

    path = pytestconfig.rootpath / "recipes" / f"{name}.yaml"
    recipe, _ = parse(TrainRecipe, [str(path)], "train", "", recipe=True)
    recipe.check()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    total, layers, *trained = COUNTS[name]
    assert sum(p.numel() for p in unet.parameters()) == total
    for method, count in zip(("dora", "lora"), trained):
        recipe.method = method
        config = recipe.adapter()
        shapes = needed(unet, config, select(unet, config))
        assert len({owner for owner, _ in shapes}) == layers
        assert sum(math.prod(shape) for shape in shapes.values()) == count
    head = path.read_text()
    assert all(f"{number:,}" in head for number in COUNTS[name] if number > 1000)
    assert f"{100 * trained[0] / total:.3f} %" in head and f"{100 * trained[1] / total:.3f} %" in head


def without(folder, copy, *names):
    """A copy of a pipeline's folder that lacks parts."""
    shutil.copytree(folder, copy)
    for name in names:
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    return copy


def edited(folder, copy, part, **values):
    """A copy of a pipeline's folder in which a config says something else."""
    shutil.copytree(folder, copy)
    path = next(path for path in (copy / part).glob("*config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return copy


def test_what_cannot_be_trained_is_one_line(base, photos, tmp_path, capsys, tiny_folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "notes.txt").write_text("no image")
    one, broken = photographs_of_a_thing(tmp_path / "one", 1), photographs_of_a_thing(tmp_path / "broken")
    (broken / "1.png").write_bytes((broken / "1.png").read_bytes()[:60])
    table = photographs_of_a_thing(tmp_path / "table")
    (table / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "sks"}\n{"file_name": "1.png", "prompt": "sks"}\n')
    (tmp_path / "a.txt").write_text("x")
    dog = {"class_prompt": "a photo of dog"}
    for model, data, more, said in (
        (base, one, {}, "with 1 image that can be used; DreamBooth needs 2 or more"),
        (base, tmp_path / "empty", {}, "a folder without images"),
        (base, tmp_path / "words", {}, "a folder without images"),
        (base, tmp_path / "nothing", {}, "which is no folder; give the folder of the images"),
        (base, photos / "0.png", {}, "which is no folder; give the folder of the images"),
        (base, broken, {}, f"{broken / '1.png'}: a truncated or damaged image"),
        (base, photos, {"instance_prompt": ""}, "instance_prompt is not set"),
        (base, photos, {"class_images": tmp_path / "c"}, "but class_prompt is not set: prior preservation needs both"),
        (base, photos, dog, "but class_images is not set: prior preservation needs both"),
        (base, photos, {**dog, "class_images": tmp_path / "a.txt"}, "which is no folder"),
        (base, photos, {**dog, "class_images": photos}, "the folder of data; give the class a folder of its own"),
        (base, photos, {**dog, "class_images": tmp_path / "words"}, "a folder without images"),
        (base, photos, {**dog, "class_images": broken}, f"{broken / '1.png'}: a truncated or damaged image"),
        (base, photos, {"resolution": 17}, "resolution is 17, which the VAE of"),
        (base, photos, {"resolution": 7}, "resolution is 7; expected a whole number from 8 to 8192"),
        (base, photos, {"caption_column": "prompt"}, "has no metadata.jsonl or metadata.csv; write one, or drop it"),
        (base, table, {"caption_column": "prompt"}, "metadata.jsonl has no caption of 2.png; add it"),
        (base, table, {"caption_column": "text"}, "item 1: expected texts under file_name and 'text' (caption_column)"),
        (base, photos, {"tasks": "[boolq]"}, "tasks is ['boolq'], which is for objective"),
        (base, photos, {"eval_size": 1}, "semantic_segmentation or vl_bart, not for dreambooth: drop it"),
        (base, photos, {"quantize": "nf4"}, "quantize is 'nf4', which objective dreambooth cannot; set quantize: none"),
        (base, photos, {"method": "full"}, "method full is not for pipelines"),
        (base, photos, {"targets": "[q_prj]"}, "q_prj"),
        (tiny_folder, photos, {}, "a model of transformers or a part of a pipeline, no pipeline of diffusers (model_index.json)"),
        (base / "unet", photos, {}, "no pipeline of diffusers (model_index.json)"),
        (image_model("vit", tmp_path / "vit"), photos, {}, "no pipeline of diffusers (model_index.json)"),
        (tmp_path / "empty", photos, {}, "holds no model, no pipeline of diffusers (model_index.json)"),
        (tmp_path / "a.txt", photos, {}, "is a file; give the folder of a pipeline of diffusers"),
        (tmp_path / "none", photos, {}, "no such folder; give the folder of a pipeline of diffusers"),
        (without(base, tmp_path / "lacks", "vae"), photos, {}, "cannot load"),
        (edited(base, tmp_path / "paint", "vae", latent_channels=3), photos, {}, "cannot load"),
        (
            edited(base, tmp_path / "flow", "scheduler", prediction_type="sample"),
            photos,
            {},
            "has another loss than epsilon or",
        ),
    ):
        assert main(words(model, data, tmp_path / "run", **more)) == 2, said
        lines = capsys.readouterr().err.strip().splitlines()
        assert said in lines[-1] and lines[-1].startswith("doratune train: "), (said, lines[-1])
        assert not (tmp_path / "run").exists()


def test_pipelines_of_another_kind_are_named(photos, base, tmp_path, capsys):
    index = json.loads((base / "model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    other = without(base, tmp_path / "other", "unet")
    (other / "model_index.json").write_text(json.dumps({part: value for part, value in index.items() if part != "unet"}))
    assert main(words(other, photos, tmp_path / "run")) == 2
    assert "is a FluxPipeline without a UNet and a VAE" in capsys.readouterr().err
    inpainting = pipeline_folder(tmp_path / "inpainting", in_channels=9)
    assert main(words(inpainting, photos, tmp_path / "run")) == 2
    assert "its UNet takes 9 channels and its VAE has 4" in capsys.readouterr().err


def test_prompts_without_the_rare_word_are_warned_of(base, photos, tmp_path, capsys):
    (tmp_path / "class").mkdir()
    shutil.copy(photos / "0.png", tmp_path / "class")
    more = {"class_images": tmp_path / "class", "class_count": 1, "class_prompt": "a photo of SKS dog", "max_steps": 1}
    more |= {"instance_prompt": "a photo of sksy dog", "sample_prompts": "[a dog]"}
    assert main(words(base, photos, tmp_path / "run", **more)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "instance_prompt is 'a photo of sksy dog', without the instance_token 'sks'" in lines[0]
    assert "class_prompt is 'a photo of SKS dog', with the instance_token 'sks'" in lines[1]
    assert "no prompt of sample_prompts has the instance_token 'sks'" in lines[2]
    assert main(words(base, photos, tmp_path / "good", max_steps=1, instance_prompt="an icon, SKS.")) == 0
    assert "warning: instance_prompt" not in capsys.readouterr().out


def test_captions_and_images_of_all_kinds(base, photos, tmp_path, capsys):
    """Alpha, grey, EXIF, an odd shape and a folder in the folder, with a prompt of its own each; a broken file is counted."""
    folder = photographs_of_a_thing(tmp_path / "kinds", 1)
    Image.new("RGBA", (30, 18), (255, 0, 0, 0)).save(folder / "alpha.png")
    Image.new("L", (7, 40), 90).save(folder / "grey.png")
    turned = Image.new("RGB", (40, 16), (9, 9, 9))
    turned.getexif()[0x0112] = 6
    (folder / "more").mkdir()
    turned.save(folder / "more" / "turned.jpg", exif=turned.getexif())
    (folder / "broken.webp").write_bytes(b"RIFF")
    names = ["0.png", "alpha.png", "grey.png", "more/turned.jpg"]
    rows = [{"file_name": name, "prompt": f"sks {number}"} for number, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    more = {"caption_column": "prompt", "instance_prompt": "", "bad_items": "skip", "max_steps": 2, "batch_size": 4}
    assert main(words(base, folder, tmp_path / "run", **more)) == 0
    out = capsys.readouterr().out
    assert "4 images of 4 prompts, no images of its class; 1 unusable images skipped" in out and "warning" not in out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]["training"]["unusable"] == 1


def test_an_image_is_scaled_and_its_middle_taken():
    image = Image.new("RGB", (60, 20), (0, 0, 255))
    image.paste((255, 0, 0), (20, 0, 40, 20))
    pixels, sizes = prepared(image, SIDE)
    assert sizes == (20, 60, 0, 16, SIDE, SIDE) and pixels.shape == (3, SIDE, SIDE)
    assert (pixels[0, :, 2:-2] > 0.95).all() and (pixels[2, :, 2:-2] < -0.95).all()
    for size in ((3, 50), (50, 3), (1, 1), (17, 16)):
        assert prepared(Image.new("RGB", size), SIDE)[0].shape == (3, SIDE, SIDE)
