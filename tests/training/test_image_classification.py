"""Image classification from the command line: real files, tiny models of four families, from the first step to the merge."""

import json

import numpy as np
import pytest
import torch
from image_models import COLOURS, KINDS, image_model, photographs, words
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import doratune
from doratune.cli.main import main
from doratune.data.image_sets import LabelledImage
from doratune.support.image_models import load_image_model, load_processor
from doratune.training.image_rows import pixels_of
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each kind: with a head of five labels, of three, or none."""
    folder, more = tmp_path_factory.mktemp("bases"), {"vit": {"body": True}, "swin": {"body": True}, "convnext": {"num_labels": 3}}
    return {kind: image_model(kind, folder / kind, **more.get(kind, {"num_labels": 5})) for kind in KINDS}


@pytest.fixture(scope="module")
def four_bits(photos, tmp_path_factory):
    """A run in nf4 over a ViT wide enough for blocks of 64."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("four_bits")
    base = image_model("vit", folder / "base", hidden_size=64, intermediate_size=128, num_labels=3)
    assert main(words(base, photos, folder / "run", quantize="nf4", targets="all-linear", max_steps=6)) == 0
    return folder / "run"


def metrics_of(output):
    return json.loads((output / "metrics.json").read_text())


def evaluated(output, task, **settings):
    """(figures of the one task, its records)."""
    usual = {"task": task, "output": output, "overwrite": "true"}
    assert main(["evaluate", *(f"--{name}={value}" for name, value in (usual | settings).items())]) == 0
    result = json.loads((output / "results.json").read_text())["results"][0]
    return result, [json.loads(line) for line in (output / f"{result['task']}.likelihood.jsonl").read_text().splitlines()]


def far(some, other):
    """The largest difference of two lists of records' probabilities; they answer the same images alike."""
    assert [(r["prompt"], r["answer"], r["correct"]) for r in some] == [(r["prompt"], r["answer"], r["correct"]) for r in other]
    return max(abs(a["probabilities"][name] - b["probabilities"][name]) for a, b in zip(some, other) for name in COLOURS)


@pytest.mark.parametrize("kind", KINDS)
def test_train_resume_save_load_merge_evaluate(kind, bases, photos, tmp_path):
    usual = {"schedule": "constant", "tasks": photos, "save_steps": 3}
    assert main(words(bases[kind], photos, tmp_path / "whole", max_steps=6, **usual)) == 0
    assert main(words(bases[kind], photos, tmp_path / "parts", max_steps=3, **usual)) == 0
    assert main([*words(bases[kind], photos, tmp_path / "parts", max_steps=6, **usual), "--resume"]) == 0
    whole, parts = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any("classifier" in name for name in whole)  # the head came along without being asked for
    metrics = metrics_of(tmp_path / "parts")
    assert metrics["unit"] == "images" and metrics["tokens"] == 6 * 8 - 8 + 4  # an epoch is 36 images: its last batch has four

    one, alone = evaluated(tmp_path / "one", photos, adapter=tmp_path / "whole" / "adapter", batch_size=1)
    _, eight = evaluated(tmp_path / "eight", photos, adapter=tmp_path / "whole" / "adapter", batch_size=8)
    lines = (tmp_path / "whole" / "scores" / "after" / "photos.likelihood.jsonl").read_text().splitlines()
    assert far(alone, eight) < 1e-5
    assert far(alone, [json.loads(line) for line in lines]) < 1e-5  # as it was in memory when the training ended
    assert one["accuracy"] > 1 / 3 + 0.2

    assert main(["merge", "--adapter", str(tmp_path / "whole" / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert [merged.config.id2label[i] for i in range(3)] == list(COLOURS)
    assert far(alone, evaluated(tmp_path / "of_merged", photos, model=tmp_path / "merged")[1]) < 1e-4


@pytest.mark.parametrize("into", ["dequantized", "original", "same"])
def test_over_a_base_in_four_bits(into, four_bits, photos, tmp_path):
    """The new head stays dense and is trained; the adapter merges all three ways."""
    run = four_bits
    assert any(name.endswith("classifier.weight") for name in load_file(run / "adapter" / "adapter_model.safetensors"))
    output = tmp_path / "merged"
    assert main(["merge", "--adapter", str(run / "adapter"), "--output", str(output), "--into", into]) == 0
    before = evaluated(tmp_path / "a", photos, adapter=run / "adapter")[0]
    assert abs(evaluated(tmp_path / "b", photos, model=output)[0]["accuracy"] - before["accuracy"]) < 0.2


def test_the_card_opens_what_it_is_of(bases, photos, tmp_path):
    """The code on an adapter's card is run as it stands, and gives the run's model."""
    assert main(words(bases["swin"], photos, tmp_path / "run", max_steps=3)) == 0
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].partition("# or with PEFT")[0]
    code = code.replace('"THIS"', repr(str(tmp_path / "run" / "adapter"))).replace('"swin"', repr(str(bases["swin"])))
    space = {}
    exec(code, space)
    model = space["model"].eval()
    _, records = evaluated(tmp_path / "e", photos, adapter=tmp_path / "run" / "adapter")
    item = LabelledImage("x", "blue", photos / "blue" / "0.png")
    pixels = pixels_of(item, load_processor(str(bases["swin"])))[None]
    with torch.no_grad():
        probabilities = model(pixels).logits.softmax(-1)[0]
    assert [model.config.id2label[i] for i in range(3)] == list(COLOURS)
    assert probabilities.tolist() == pytest.approx([records[0]["probabilities"][name] for name in COLOURS], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_and_in_full(kind, bases, photos, tmp_path):
    """The recipe's default dtype; and all weights, with batch normalization's statistics as trained."""
    assert main(words(bases[kind], photos, tmp_path / "half", max_steps=2, dtype="bfloat16")) == 0
    assert main(words(bases[kind], photos, tmp_path / "full", max_steps=8, method="full", lr=3e-3, tasks=photos)) == 0
    assert metrics_of(tmp_path / "full")["trainable"] == metrics_of(tmp_path / "full")["total"]  # the head too
    lines = (tmp_path / "full" / "scores" / "after" / "photos.likelihood.jsonl").read_text().splitlines()
    after = [json.loads(line) for line in lines]
    assert far(after, evaluated(tmp_path / "again", photos, model=tmp_path / "full" / "model")[1]) < 1e-5


def test_statistics_of_the_base_are_held_under_an_adapter(bases, photos, tmp_path):
    """ResNet's running means are in no adapter's file: what was trained would not be what is loaded."""
    model = load_image_model(str(bases["resnet"]), list(COLOURS))
    before = {name: b.clone() for name, b in model.named_buffers()}
    places = {"model": str(bases["resnet"]), "data": str(photos), "output": str(tmp_path / "run")}
    how = {"objective": "image_classification", "targets": "all-layers", "rank": 2, "dtype": "float32", "max_steps": 2}
    train(TrainRecipe(**places, **how, tensorboard=False), say=lambda line: None, model=model)
    after = dict(model.named_buffers())
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(after[name], b) for name, b in before.items())
    assert any("running statistics are the base's" in note for note in doratune.verify(model).notes)


def test_a_head_of_the_same_size_but_other_labels_is_new(tmp_path, photos):
    """from_pretrained would load cats, dogs, birds for blue, green, red, and an adapter would leave them frozen."""
    labels = {"id2label": {0: "cat", 1: "dog", 2: "bird"}, "label2id": {"cat": 0, "dog": 1, "bird": 2}}
    base = image_model("vit", tmp_path / "base", **labels)
    old = AutoModelForImageClassification.from_pretrained(base)
    new = load_image_model(str(base), list(COLOURS))
    same = load_image_model(str(base), ["cat", "dog", "bird"])
    assert torch.equal(old.classifier.weight, same.classifier.weight)
    assert not torch.equal(old.classifier.weight, new.classifier.weight)
    body = [name for name, _ in old.named_parameters() if not name.startswith("classifier")]
    assert all(torch.equal(old.get_parameter(name), new.get_parameter(name)) for name in body)
    doratune.attach(new, doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    doratune.attach(same, doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    assert new.classifier.weight.requires_grad and not same.classifier.weight.requires_grad


def test_a_head_that_has_the_classes_is_kept(tmp_path, photos, capsys):
    """Also where the data have some of its labels only: the numbers stay the model's."""
    names = ["yellow", "red", "green", "blue"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    base = image_model("resnet", tmp_path / "base", **labels)
    assert main(words(base, photos, tmp_path / "run", max_steps=1)) == 0
    assert "the model's own head, which has them" in capsys.readouterr().out
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    head = {name.rpartition("classifier.1.")[2] for name in tensors if "classifier" in name}
    assert head and "weight" not in head  # adapted as any layer, not trained whole
    result, records = evaluated(tmp_path / "e", photos, adapter=tmp_path / "run" / "adapter")
    assert set(records[0]["probabilities"]) == set(names) and result["chance"] == 0.25


def test_accumulated_batches_are_one_large_batch(bases, photos, tmp_path):
    """Image models take num_items_in_batch and do not use it: transformers alone would add the losses up."""
    for name, settings in {"one": {"batch_size": 12}, "three": {"batch_size": 4, "gradient_accumulation": 3}}.items():
        more = {"max_steps": 3, "optimizer": "sgd", "lr": 0.5, "max_grad_norm": 0}
        assert main(words(bases["vit"], photos, tmp_path / name, **settings, **more)) == 0
    one, three = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "three"))
    for name in one:
        assert torch.allclose(one[name], three[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing_is_the_same_training(kind, bases, photos, tmp_path, capsys):
    for name in ("none", kind):
        assert main(words(bases["vit"], photos, tmp_path / name, max_steps=2, checkpointing=name)) == 0
    plain, saved = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("none", kind))
    assert all(torch.allclose(plain[name], saved[name], atol=1e-6) for name in plain)
    assert main(words(bases["resnet"], photos, tmp_path / "r", checkpointing=kind)) == 2
    assert "which ResNetForImageClassification cannot; set checkpointing: none" in capsys.readouterr().err


def test_tables_arrays_workers_and_a_validation_set(bases, photos, tmp_path):
    rows = [f"{label}/{i}.png,{label},{'val' if i > 8 else 'train'}" for label in COLOURS for i in range(12)]
    table = photos / "all.csv"
    table.write_text("\n".join(["path,colour,split", *rows]))
    more = {"columns": "{label: colour}", "eval_data": table, "max_steps": 4, "workers": 1}
    assert main(words(bases["vit"], table, tmp_path / "table", **more)) == 0
    metrics = metrics_of(tmp_path / "table")
    assert metrics["data"] == {"training": {"examples": 27, "unusable": 0}, "evaluation": {"examples": 9, "unusable": 0}}
    last = [row for row in metrics["log"] if "eval_loss" in row][-1]
    assert {"eval_accuracy", "eval_balanced_accuracy", "eval_auroc"} <= last.keys()
    generator = np.random.default_rng(0)
    held = {}
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        held[f"{split}_labels"] = (np.arange(count) % 2)[:, None].astype(np.uint8)
        held[f"{split}_images"] = (generator.integers(0, 60, (count, 9, 9)) + 180 * held[f"{split}_labels"][:, None]).astype(
            np.uint8
        )
    np.savez(tmp_path / "scans.npz", **held)
    more = {"eval_data": tmp_path / "scans.npz", "tasks": tmp_path / "scans.npz", "max_steps": 8, "lr": 2e-2}
    assert main(words(bases["resnet"], tmp_path / "scans.npz", tmp_path / "arrays", **more)) == 0
    assert metrics_of(tmp_path / "arrays")["data"]["evaluation"]["examples"] == 6
    result = json.loads((tmp_path / "arrays" / "scores" / "after" / "results.json").read_text())["results"][0]
    assert result["total"] == 6 and result["auroc"] == 1.0
