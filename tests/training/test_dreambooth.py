"""DreamBooth from the command line, on tiny pipelines of both kinds: losses, samples, resume, merge, what diffusers opens."""

import json
import re
import shutil

import pytest
import torch
from pipelines import SIDE, photographs_of_a_thing, pipeline_folder, words
from safetensors.torch import load_file

import doratune
from doratune.cli.main import main
from doratune.data.images import open_image
from doratune.errors import UserError
from doratune.publishing.push import parcel
from doratune.support.pipelines import load_pipeline, networks

pytest.importorskip("diffusers")
PRIOR = {"class_prompt": "a photo of dog", "class_count": 3}
PROMPTS = ("a photo of sks dog", "a photo of dog")
ENCODERS = {"sd": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs_of_a_thing(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: pipeline_folder(folder / kind, kind) for kind in ENCODERS}


@pytest.fixture(scope="module")
def runs(bases, photos, tmp_path_factory):
    """A run of each kind, text encoders and prior preservation included."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, base in bases.items():
        more = {"class_images": folder / f"{kind}-class", "sample_prompts": str([*PROMPTS]), "sample_steps": 2}
        assert main(words(base, photos, folder / kind, text_encoders="adapted", snr_gamma=5, **PRIOR, **more)) == 0
    return folder


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def said_by(pipeline, part):
    """What a network of a pipeline computes of a fixed input."""
    draw, module = torch.Generator().manual_seed(5), networks(pipeline)[part]
    with torch.no_grad():
        if part != "unet":
            return module(torch.randint(0, 60, (2, 7), generator=draw)).last_hidden_state
        x, text = (torch.randn(shape, generator=draw) for shape in ((2, 4, 8, 8), (2, 5, module.config.cross_attention_dim)))
        sizes = {"text_embeds": torch.randn(2, 12, generator=draw), "time_ids": torch.full((2, 6), 16.0)}
        return module(x, 10, encoder_hidden_states=text, added_cond_kwargs=sizes).sample


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_run_leaves_losses_class_images_and_samples(kind, runs):
    run, metrics = runs / kind, metrics_of(runs / kind)
    assert metrics["data"]["training"] == {"instance": 3, "class": 3, "unusable": 0} and metrics["unit"] == "images"
    assert len(metrics["log"]) == 4
    for row in metrics["log"]:
        assert row["loss"] == pytest.approx(row["instance_loss"] + row["prior_loss"], rel=1e-5)
    assert len(list((runs / f"{kind}-class").glob("*.png"))) == 3
    steps = [(sample["step"], sample["prompt"]) for sample in metrics["samples"]]
    assert steps == [(step, prompt) for step in (0, 2, 4) for prompt in PROMPTS]
    assert all(open_image(run / sample["image"]).size == (SIDE, SIDE) for sample in metrics["samples"])


def test_samples_and_both_losses_stand_on_the_page(runs, tmp_path, capsys):
    metrics = metrics_of(runs / "sd")
    strange = [
        {"step": 9, "prompt": "x", "image": "../../../../etc/passwd"},
        {"step": 9, "prompt": "y", "image": "samples/lost.png"},
    ]
    shutil.copytree(runs / "sd", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics | {"samples": metrics["samples"] + strange}))
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    section = page.partition('<section id="answers">')[2].partition("</section>")[0]
    assert section.count('<img src="data:image/jpeg;base64,') == 6 and section.count("step 4</figcaption>") == 2
    assert '"prior_loss": ' in page and '"instance_loss": ' in page
    assert "samples/lost.png is not shown" in capsys.readouterr().out and "passwd" not in page
    assert main(["runs", str(tmp_path)]) == 0 and "finished" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ENCODERS)
def test_diffusers_opens_what_a_run_leaves(kind, bases, runs):
    """load_lora_weights, doratune.load on each part, and merging give the same outputs."""
    adapter, parts = runs / kind / "adapter", ["unet", *ENCODERS[kind]]
    plain, theirs, ours = (load_pipeline(str(bases[kind])) for _ in range(3))
    theirs.load_lora_weights(str(adapter))
    for part in parts:
        doratune.load(networks(ours)[part], adapter / part)
    assert main(["merge", "--adapter", str(adapter), "--output", str(runs / f"{kind}-merged")]) == 0
    merged = load_pipeline(str(runs / f"{kind}-merged"))
    for part in parts:
        reference = said_by(ours, part)
        assert (reference - said_by(plain, part)).abs().max() > 1e-4, part
        for other in (theirs, merged):
            torch.testing.assert_close(said_by(other, part), reference, rtol=1e-4, atol=1e-5)
    whole = doratune.load(load_pipeline(str(bases[kind])).unet, adapter)  # the file for diffusers, its unet
    assert len(list(doratune.adapters(whole))) == 32


def test_a_resumed_run_is_the_uninterrupted_one(bases, photos, runs, tmp_path):
    settings = {"gradient_accumulation": 2, "text_encoders": "adapted", "dropout": 0.1}
    more = {"class_images": runs / "sd-class", **PRIOR, **settings, "batch_size": 1, "save_steps": 2, "keep_checkpoints": 5}
    assert main(words(bases["sd"], photos, tmp_path / "whole", **more)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    (tmp_path / "part" / "metrics.json").unlink()
    samples = {"sample_prompts": "[sks]", "sample_steps": 1}  # samples draw nothing of the run's
    assert main(words(bases["sd"], photos, tmp_path / "part", resume="true", **more, **samples)) == 0
    for part in ("unet", "text_encoder"):
        whole, resumed = (load_file(tmp_path / run / "adapter" / part / "adapter_model.safetensors") for run in ("whole", "part"))
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    whole, resumed = (metrics_of(tmp_path / run)["log"] for run in ("whole", "part"))
    assert [(row["loss"], row["prior_loss"]) for row in whole] == [(row["loss"], row["prior_loss"]) for row in resumed]


def test_gradient_checkpointing_is_the_same_training(bases, photos, tmp_path):
    kinds = ("none", "reentrant", "non-reentrant")
    for kind in kinds:
        assert main(words(bases["sdxl"], photos, tmp_path / kind, max_steps=2, checkpointing=kind, text_encoders="adapted")) == 0
    for part in ("unet", "text_encoder", "text_encoder_2"):
        plain, *others = (load_file(tmp_path / kind / "adapter" / part / "adapter_model.safetensors") for kind in kinds)
        assert all(torch.allclose(plain[key], other[key], atol=1e-5) for other in others for key in plain), part


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"targets": "all-layers", "method": "lora"}])
def test_velocity_dtypes_and_methods(settings, photos, tmp_path):
    base = pipeline_folder(tmp_path / "base", "sd", "v_prediction")
    assert main(words(base, photos, tmp_path / "run", **settings, max_steps=2, snr_gamma=5, sample_prompts="[sks]")) == 0
    row = metrics_of(tmp_path / "run")["log"][-1]
    assert 0 < row["instance_loss"] == pytest.approx(row["loss"]) and "prior_loss" not in row


def test_an_adapter_that_diffusers_cannot_say_is_merged(bases, photos, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(words(bases["sd"], photos, run, method="dvora", magnitude_axis="output", max_steps=2)) == 0
    assert "load_lora_weights cannot open this adapter: " in capsys.readouterr().out
    assert not list((run / "adapter").glob("*.safetensors"))
    assert main(["merge", "--adapter", str(run / "adapter"), "--output", str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]["unet"]["ok"]
    ours = load_pipeline(str(bases["sd"]))
    with pytest.raises(UserError, match=r"did you mean .*unet"):
        doratune.load(ours.unet, run / "adapter")
    doratune.load(ours.unet, run / "adapter" / "unet")
    merged = load_pipeline(str(tmp_path / "merged"))
    torch.testing.assert_close(said_by(merged, "unet"), said_by(ours, "unet"), rtol=1e-4, atol=1e-5)


def test_adapter_and_pipeline_are_pushed_whole(runs, bases, tmp_path):
    """A pipeline goes with its scheduler; an adapter whose base only this machine has does not go."""
    assert main(["merge", "--adapter", str(runs / "sd" / "adapter"), "--output", str(tmp_path / "merged"), "--check", "false"]) == 0
    sent = parcel(tmp_path / "merged").sent
    assert {"model_index.json", "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"} <= sent.keys()
    with pytest.raises(UserError, match="a path of this machine"):
        parcel(runs / "sd" / "adapter")
    card = (runs / "sd" / "adapter" / "README.md").read_text()
    assert 'pipe.load_lora_weights("THIS")' in card and "library_name: diffusers" in card and str(runs) not in card


@pytest.mark.parametrize("kind", ENCODERS)
def test_inspect_counts_what_the_run_trained(kind, runs, bases, tmp_path, capsys):
    """Each part that has an adapter, in sum the run's numbers; before a run, the UNet under the names that a run gives."""
    adapter = runs / kind / "adapter"
    assert main(["inspect", "--adapter", str(adapter), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    parts = json.loads(last)["parts"]
    assert set(parts) == {"unet", *ENCODERS[kind]} and {f"{part}:" for part in parts} <= set(lines)
    assert sum(part["trainable"] for part in parts.values()) == metrics_of(runs / kind)["trainable"]
    assert f"next: doratune merge --adapter {adapter} --output merged" in lines
    assert main(["inspect", "--model", str(bases[kind]), "--targets", "to_q,to_v", "--rank", "2", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["parts"]["unet"]["rows"]
    recipe = {"sd": "sd15", "sdxl": "sdxl"}[kind]
    assert f"next: doratune train recipes/dreambooth_{recipe}.yaml --model {bases[kind]} --data photos" in lines
    assert rows and all(re.fullmatch(r"unet\..*\.to_[qv]", row["module"]) and row["rank"] == 2 for row in rows)
    assert main(["inspect", "--adapter", str(adapter), "--model", str(bases[kind]), "--quantize", "nf4"]) == 2
    assert "quantize is 'nf4', which is not for text-to-image pipelines" in capsys.readouterr().err


def test_inspect_of_parts_that_the_pipeline_lacks(runs, bases, capsys):
    assert main(["inspect", "--adapter", str(runs / "sdxl" / "adapter"), "--model", str(bases["sd"])]) == 2
    assert f"{bases['sd']} has no text_encoder_2, of which" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(bases, photos, tmp_path, capsys):
    assert main(words(bases["sd"], photos, tmp_path / "run", lr=1e30, max_grad_norm=0, method="lora")) == 2
    assert "--resume from the last checkpoint" in capsys.readouterr().err.strip().splitlines()[-1]
