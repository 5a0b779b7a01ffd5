"""VL-BART from the command line: several tasks in one run, from features to the merge; real files, tiny models."""

import json

import pytest
import torch
from image_models import image_model
from safetensors.torch import load_file
from seeing_bart import seen_data, tiny_bart, train_words

from doratune.cli.main import main
from doratune.support.vl_bart import load_vl_bart
from doratune.training.task_order import TaskOrder


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """(BART, image tower, data)."""
    folder = tmp_path_factory.mktemp("desk")
    tower = image_model("vit", folder / "tower", body=True)
    return tiny_bart(folder / "bart", steps=150), tower, seen_data(folder / "data")


def records_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.generate.jsonl")) for line in path.read_text().splitlines()]


def evaluated(output, task, **settings):
    usual = {"task": task, "output": output, "overwrite": "true", "features": output.parent / "features"}
    assert main(["evaluate", *(f"--{name}={value}" for name, value in (usual | settings).items())]) == 0
    return json.loads((output / "results.json").read_text())["results"][0], records_of(output)


def test_train_resume_save_load_merge_evaluate(desk, tmp_path):
    bart, tower, data = desk
    usual = {"save_steps": 15, "tasks": f"{data}[:24]", "lr": 2e-2}
    assert main(train_words(bart, tower, data, tmp_path / "whole", max_steps=30, **usual)) == 0
    assert main(train_words(bart, tower, data, tmp_path / "parts", max_steps=15, **usual)) == 0
    assert main([*train_words(bart, tower, data, tmp_path / "parts", max_steps=30, **usual), "--resume"]) == 0
    whole, parts = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any("encoder.visual.project" in name for name in whole)
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert metrics["unit"] == "examples" and metrics["data"]["training"] == {"unusable": 0, "examples": 60}
    assert metrics["log"][-1]["loss"] < 0.7 * metrics["log"][0]["loss"]

    adapter = tmp_path / "whole" / "adapter"
    one, alone = evaluated(tmp_path / "one", f"{data}[:24]", adapter=adapter, batch_size=1)
    eight, together = evaluated(tmp_path / "eight", f"{data}[:24]", adapter=adapter, batch_size=8)
    assert alone == together == records_of(tmp_path / "whole" / "scores" / "after")
    assert one["accuracy"] == eight["accuracy"] and one["cider"] == eight["cider"] and one["total"] == 24
    beams = evaluated(tmp_path / "b1", f"{data}[:12]", adapter=adapter, batch_size=1, beams=3)[1]
    assert beams == evaluated(tmp_path / "b8", f"{data}[:12]", adapter=adapter, batch_size=8, beams=3)[1]

    assert main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert load_vl_bart(str(tmp_path / "merged"), complete=True).config.visual["tower"] == str(tower)
    assert evaluated(tmp_path / "m", f"{data}[:24]", model=tmp_path / "merged")[1] == alone


def test_one_that_sees_goes_on_learning(desk, tmp_path, capsys):
    """Full fine-tuning learns the colours; its folder is the base of an adapter, whose tower need not be named again."""
    bart, tower, data = desk
    more = {"method": "full", "lr": 5e-3, "batch_size": 20, "epochs": 20, "tasks": data}
    assert main(train_words(bart, tower, data, tmp_path / "full", **more)) == 0
    metrics = json.loads((tmp_path / "full" / "metrics.json").read_text())
    assert metrics["trainable"] == metrics["total"]
    after = json.loads((tmp_path / "full" / "scores" / "after" / "results.json").read_text())["results"][0]
    assert after["right"] > 0.6 * after["total"] > after["majority"] * after["total"]
    words = train_words(tmp_path / "full" / "model", tower, data, tmp_path / "more", max_steps=2)
    assert main([word for word in words if not word.startswith("--image_tower")]) == 0
    trained = load_file(tmp_path / "more" / "adapter" / "adapter_model.safetensors")
    assert not any("visual" in name for name in trained)  # it comes from a file: frozen
    assert main([*words, "--overwrite", "--projector=whole", "--also_train=[layernorm_embedding]"]) == 0
    trained = load_file(tmp_path / "more" / "adapter" / "adapter_model.safetensors")
    assert any("visual.project" in name for name in trained) and any("layernorm_embedding" in name for name in trained)


def test_accumulated_batches_are_one_large_batch(desk, tmp_path):
    """BART takes num_items_in_batch and does not use it: transformers alone would add the losses up."""
    bart, tower, data = desk
    more = {"max_steps": 3, "optimizer": "sgd", "lr": 0.3, "max_grad_norm": 0}
    for name, settings in {"one": {"batch_size": 60}, "three": {"batch_size": 5, "gradient_accumulation": 3}}.items():
        assert main(train_words(bart, tower, f"{data}[:12]", tmp_path / name, **more | settings)) == 0
    one, three = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "three"))
    assert all(torch.allclose(one[name], three[name], rtol=1e-3, atol=1e-5) for name in one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_held_out_items_and_checkpointing(dtype, desk, tmp_path):
    bart, tower, data = desk
    more = {"max_steps": 4, "dtype": dtype, "eval_size": 8, "eval_steps": 2, "checkpointing": "non-reentrant", "workers": 1}
    assert main(train_words(bart, tower, data, tmp_path / "run", **more)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["eval_loss"] > 0 and 0 <= metrics["eval_token_accuracy"] <= 1


def test_batches_are_of_one_task_by_size():
    tasks = ["a"] * 21 + ["b"] * 10 + ["c"] * 3
    order = TaskOrder(tasks, 4, seed=1)
    first, again = list(order), list(TaskOrder(tasks, 4, seed=1))
    assert first == again and sorted(first) == list(range(34))
    batches = [{tasks[i] for i in first[k : k + 4]} for k in range(0, 34, 4)]
    assert sum(len(batch) == 1 for batch in batches) >= 7 and [batch for batch in batches[:7] if batch == {"a"}]
    order.set_epoch(1)
    assert list(order) != first and list(TaskOrder(tasks, 4, seed=2)) != first


def test_what_a_run_refuses(desk, tmp_path, capsys, tiny_folder):
    bart, tower, data = desk
    broken = tmp_path / "data"
    items = json.loads(seen_data(broken).read_text())
    (broken / "red_1.png").write_text("no image")
    for label, settings, said in (
        ("tower", {"image_tower": "null"}, "image_tower is not set; give the image model"),
        ("text", {"packing": "true"}, "packing is True, which is for objective language_modeling, not for vl_bart: drop it"),
        ("method", {"method": "prefix"}, "method prefix trains no visual embedding"),
        ("llama", {"model": tiny_folder}, "is a llama; give a BART"),
        ("long", {"max_length": 500}, "max_length is 500, but"),
        ("adapted", {"vision_tower": "adapted"}, "vision_tower is 'adapted', which is for objective language_modeling"),
        ("skip", {"too_long": "skip"}, "too_long is 'skip', which is for objective language_modeling"),
        ("tiny", {"image_tower": bart}, "preprocessor_config.json"),
        ("broken", {"data": broken / "mine.json"}, "item 2: "),
        ("size", {"eval_size": 99}, "eval_size is 99, but"),
    ):
        source = settings.pop("data", data)
        assert main(train_words(bart, tower, source, tmp_path / label, **settings)) == 2, label
        assert said in capsys.readouterr().err.strip().splitlines()[-1], label
        assert not (tmp_path / label).exists()
    assert main(train_words(bart, tower, broken / "mine.json", tmp_path / "skipped", bad_items="skip", max_steps=1)) == 0
    counts = json.loads((tmp_path / "skipped" / "metrics.json").read_text())["data"]["training"]
    lost = [one for one in items if "red_1.png" in (one.get("image"), *one.get("images", ()))]
    assert counts["unusable"] == len(lost) > 1


def test_what_an_evaluation_refuses(desk, tmp_path, capsys):
    bart, tower, data = desk
    assert main(train_words(bart, tower, data, tmp_path / "run", max_steps=1)) == 0
    adapter, other = tmp_path / "run" / "adapter", image_model("resnet", tmp_path / "other", body=True)
    for settings, said in (
        ({"image_tower": other}, "is not the image tower that the model was trained on"),
        ({"protocol": "likelihood"}, "VL-BART writes its answers; set protocol: generate"),
        ({"task": f"[{data}, {data}]"}, "two tasks are called 'mine'"),
        ({"task": "vqq:x"}, "no task is called 'vqq'"),
    ):
        usual = {"task": data, "output": tmp_path / "e", "adapter": adapter, "features": tmp_path / "features"}
        assert main(["evaluate", *(f"--{name}={value}" for name, value in (usual | settings).items())]) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "e").exists()
