"""Training through the command line, on a tiny model folder with real files and real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import grid
import pytest
import torch
import yaml
from conftest import tiny_llama
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import doratune
from doratune.analysis import adapter_changes
from doratune.cli.main import main
from doratune.data import instruction
from doratune.data.encode import AnswerCollator, encode_all
from doratune.training import TrainerMixin
from doratune.training.movement import measure
from doratune.training.train import last_checkpoint

ANSWERS = ("true", "false")


def items(count=48):
    return [
        {
            "instruction": f"Is {i} even? {'really ' * (i % 7)}",
            "input": "",
            "output": f"the correct answer is {ANSWERS[i % 2]}",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def recipe(tiny_folder, tmp_path_factory):
    """A recipe file for the tiny model: fp32, every step logged."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "data.json").write_text(json.dumps(items()))
    settings = {
        "model": str(tiny_folder),
        "data": str(folder / "data.json"),
        "rank": 4,
        "targets": ["q_proj", "v_proj", "down_proj"],
        "lr": 5e-3,
        "batch_size": 4,
        "epochs": 2,
        "dropout": 0.05,
        "dtype": "float32",
        "log_steps": 1,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


def losses(output):
    return {row["step"]: row["loss"] for row in json.loads((output / "metrics.json").read_text())["log"] if "loss" in row}


def test_a_run_leaves_everything_behind(recipe, tmp_path, capsys):
    output = tmp_path / "run"
    options = [
        "--output",
        str(output),
        "--eval_size",
        "8",
        "--gradient_accumulation",
        "2",
        "--schedule",
        "cosine",
        "--json",
    ]
    assert main(["train", str(recipe), *options, "--checkpointing", "non-reentrant", "--warmup_steps", "2"]) == 0
    printed = capsys.readouterr().out
    last = json.loads(printed.strip().splitlines()[-1])
    assert last["steps"] == 10
    assert "40 examples, none too long" in printed
    assert "the magnitude moved" in printed
    assert last["magnitude_moved"] > 1e-4
    assert last["direction_moved"] > 1e-7
    history = losses(output)
    assert history[10] < history[1]
    assert last["eval_loss"] is not None
    assert yaml.safe_load((output / "recipe.yaml").read_text())["schedule"] == "cosine"
    assert list((output / "runs").rglob("events*"))  # TensorBoard
    assert {p.name for p in (output / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "doratune.json",
    }
    checkpoint = last_checkpoint(output)
    assert not list(checkpoint.glob("model*.safetensors"))  # the adapter alone
    saved, result = (load_file(p / "adapter_model.safetensors") for p in (checkpoint, output / "adapter"))
    assert all(torch.equal(saved[k], result[k]) for k in result)
    model = doratune.load(tiny_llama(), output / "adapter")
    assert len(list(doratune.adapters(model))) == 6


@pytest.mark.parametrize(
    "options",
    [
        ["--checkpointing", "reentrant", "--dtype", "bfloat16", "--gradient_accumulation", "2"],
        ["--magnitude_axis", "input", "--norm_gradient", "full", "--weight_decay", "0.1", "--magnitude_lr_ratio", "0.5"],
        ["--targets", "[q_proj]", "--magnitude_only", "[o_proj, up_proj]", "--too_long", "skip", "--group_by_length", "false"],
        ["--method", "lora", "--rank_scaling", "rslora", "--train_on_prompt", "--optimizer", "adamw_torch_fused"],
        ["--also_train", "[lm_head]", "--rank_overrides", "{q_proj: 2}", "--schedule", "constant", "--tensorboard", "false"],
    ],
)
def test_settings_reach_the_run(options, recipe, tmp_path, capsys):
    """Each combination trains, saves and loads; the resolved recipe says what was asked for."""
    output = tmp_path / "run"
    assert main(["train", str(recipe), "--output", str(output), "--max_steps", "3", *options]) == 0
    saved = yaml.safe_load((output / "recipe.yaml").read_text())
    given = {k[2:]: v for k, v in zip(options, [*options[1:], "--"]) if k.startswith("--")}
    for key, value in given.items():
        assert saved[key] == (True if value.startswith("--") else yaml.safe_load(value))
    model = doratune.load(tiny_llama(), output / "adapter")
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    assert "warning" not in capsys.readouterr().out.replace("warning: null", "")


def test_full_fine_tuning_trains_everything(recipe, tmp_path, capsys):
    """All weights move, in float32; the result is an ordinary model folder; resumed and scored as any run is."""
    output = tmp_path / "run"
    settings = ["--method", "full", "--lr", "1e-3", "--dtype", "bfloat16", "--save_steps", "4"]
    score = ["--tasks", "[demo]", "--tasks_limit", "6", "--tasks_protocol", "likelihood"]
    assert main(["train", str(recipe), "--output", str(output), *settings, *score, "--max_steps", "8"]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["trainable"] == metrics["total"] == sum(p.numel() for p in tiny_llama().parameters())
    assert metrics["moved"] is None
    assert metrics["peak_bytes"] > 1e7
    assert metrics["cpu_seconds"] > 0
    results = json.loads((output / "scores" / "after" / "results.json").read_text())["results"]
    assert [(r["task"], r["protocol"], r["total"]) for r in results] == [("demo", "likelihood", 6)]
    trained, before = load_file(output / "model" / "model.safetensors"), tiny_llama().state_dict()
    assert {t.dtype for t in trained.values()} == {torch.float32}
    assert all(not torch.equal(trained[name], before[name]) for name in trained)
    assert last_checkpoint(output).name == "checkpoint-8"
    assert main(["train", str(recipe), "--output", str(tmp_path / "q"), "--method", "full", "--quantize", "nf4"]) == 2
    assert "full trains a dense base; quantize is 'nf4'" in capsys.readouterr().err
    scored = ["--model", str(output / "model"), "--task", "demo", "--limit", "3", "--output", str(tmp_path / "e")]
    assert main(["evaluate", *scored]) == 0


@pytest.mark.parametrize("method", ["series", "parallel", "prefix"])
def test_baselines_train_resume_and_are_scored(method, recipe, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["train", str(recipe), "--method", method, "--baseline_size", "4", "--lr", "1e-2", "--save_steps", "3"]
    score = ["--tasks", "[demo]", "--tasks_limit", "6", "--dtype", "bfloat16"]
    assert main([*options, *score, "--output", str(output), "--max_steps", "6", "--keep_checkpoints", "2"]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert 0 < metrics["trainable"] < 0.1 * metrics["total"]
    saved = load_file(output / "adapter" / "baseline_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == metrics["trainable"]
    assert {p.name for p in (output / "checkpoint-3").iterdir()} >= {"baseline_model.safetensors", "optimizer.pt"}
    assert not list((output / "checkpoint-3").glob("model*"))

    (output / "metrics.json").unlink()
    shutil.rmtree(output / "checkpoint-6")
    assert main([*options, *score, "--output", str(output), "--max_steps", "6", "--resume"]) == 0
    again = load_file(output / "adapter" / "baseline_model.safetensors")
    assert all(torch.equal(saved[name], again[name]) for name in saved)

    capsys.readouterr()
    arguments = ["--task", "demo", "--limit", "6", "--dtype", "bfloat16", "--output", str(tmp_path / "e"), "--json"]
    assert main(["evaluate", "--adapter", str(output / "adapter"), *arguments]) == 0
    scored = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    during = json.loads((output / "scores" / "after" / "results.json").read_text())
    keys = "task", "protocol", "right", "total"
    assert [[r[k] for k in keys] for r in scored["results"]] == [[r[k] for k in keys] for r in during["results"]]
    assert main(["merge", "--adapter", str(output / "adapter"), "--output", str(tmp_path / "m")]) == 2
    assert "holds a baseline" in capsys.readouterr().err


def test_a_run_killed_while_it_is_scored_resumes_to_its_end(recipe, tmp_path, monkeypatch):
    from doratune.evaluation import evaluate as evaluation

    output = tmp_path / "run"
    options = ["train", str(recipe), "--output", str(output), "--max_steps", "4", "--tasks", "[demo]", "--tasks_limit", "4"]
    options += ["--eval_size", "8", "--save_steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(options) == 130
    assert not (output / "metrics.json").exists()
    assert main([*options, "--resume"]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["eval_loss"] is not None  # the checkpoint was written before the evaluation
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]["Clock"]["attributes"]
    spent = state["spent"] | {"peak_bytes": state["peak_bytes"]}
    assert {key: metrics[key] for key in spent} == spent  # of the first process: the second trained nothing
    assert spent["tokens"] > 0
    assert (output / "scores" / "after" / "results.json").is_file()


def test_a_baselines_setting_is_named_as_the_recipe_names_it(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--output", str(tmp_path / "run"), "--method", "series", "--baseline_size", "0"]) == 2
    assert "doratune train: baseline_size is 0; expected" in capsys.readouterr().err


def test_a_task_that_is_not_there_is_found_before_the_training(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--output", str(tmp_path / "run"), "--tasks", "[boolk]"]) == 2
    assert "unknown task 'boolk'; did you mean 'boolq'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_chat_data(recipe, tmp_path, capsys):
    turns = [[("user", f"{i}?"), ("assistant", ANSWERS[i % 2])] for i in range(12)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in turn]}) for turn in turns]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    options = ["--data", str(tmp_path / "chat.jsonl"), "--output", str(tmp_path / "run"), "--max_steps", "2"]
    assert main(["train", str(recipe), *options]) == 0
    assert "12 examples, none too long" in capsys.readouterr().out


def start(recipe, output, *options):
    command = [sys.executable, "-m", "doratune.cli", "train", str(recipe), "--output", str(output), *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}  # sums depend on it
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_is_the_same_run(number, recipe, tmp_path):
    """Same losses and the same adapter, bit for bit, as a run that nobody stopped."""
    assert main(["train", str(recipe), "--output", str(tmp_path / "whole")]) == 0
    output = tmp_path / "stopped"
    process = start(recipe, output, "--save_steps", "5", "--epochs", "2")
    deadline = time.monotonic() + 600
    while last_checkpoint(output) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert "--resume" in errors
    stopped_at = int(last_checkpoint(output).name.split("-")[1])
    assert 5 <= stopped_at < 24
    assert not (output / "adapter").exists()
    assert main(["train", str(recipe), "--output", str(output), "--resume"]) == 0
    expected, got = losses(tmp_path / "whole"), losses(output)
    assert got == expected
    assert len(got) == 24
    a, b = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (tmp_path / "whole", output))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(recipe, tmp_path, capsys):
    output = tmp_path / "run"
    options = [
        "--output",
        str(output),
        "--lr",
        "1e18",
        "--max_grad_norm",
        "0",
        "--save_steps",
        "1",
        "--warmup_steps",
        "4",
    ]
    assert main(["train", str(recipe), *options, "--keep_checkpoints", "2"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("doratune train: the ")  # the loss or the adapter, whichever went first
    assert "--resume" in error
    tensors = load_file(last_checkpoint(output) / "adapter_model.safetensors")
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert not (output / "adapter").exists()


def test_incomplete_checkpoints_are_not_resumed_from(recipe, tmp_path, capsys):
    output = tmp_path / "run"
    (output / "checkpoint-7").mkdir(parents=True)
    (output / "checkpoint-7" / "trainer_state.json").write_text('{"half')
    assert main(["train", str(recipe), "--output", str(output), "--resume"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


MISTAKES = [
    (["--rnk", "4"], "unknown setting --rnk; did you mean 'rank'"),
    (["--rank", "0"], "rank is 0"),
    (["--rank", "four"], "rank"),
    (["--targets", "[q_prj]"], "did you mean 'q_proj'"),
    (["--data", "missing.json"], "missing.json: no such data file"),
    (["--model", "/nowhere/model"], "no such model folder"),
    (["--max_length", "2"], "longer than max_length 2"),
    (["--lr", "0"], "lr is 0"),
    (["--eval_size", "500"], "eval_size is 500"),
    (["--optimizer", "adamm"], "adamm"),
    (["--data", ""], "data is not set"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_are_one_line(options, message, recipe, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", str(recipe), "--output", str(output), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not output.exists()


def test_recipe_mistakes(recipe, tmp_path, capsys):
    for content, message in (
        ("rnak: 4\n", "unknown setting 'rnak'; did you mean 'rank'"),
        ("rank: [4\n", "line 2: not a readable YAML"),
        ("- a\n", "holds no settings"),
    ):
        (tmp_path / "bad.yaml").write_text(content)
        assert main(["train", str(tmp_path / "bad.yaml")]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no such recipe" in capsys.readouterr().err
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    assert main(["train", str(recipe), "--output", str(tmp_path / "used")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    assert main(["train", str(recipe), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "o")]) == 2
    assert "no config.json" in capsys.readouterr().err
    tiny_llama().config.save_pretrained(tmp_path / "model")
    assert main(["train", str(recipe), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "o")]) == 2
    assert "no weights" in capsys.readouterr().err


def test_defaults_file_and_flags_in_this_order(recipe, tmp_path):
    from doratune.cli.arguments import parse
    from doratune.training.recipe import TrainRecipe

    settings, as_json = parse(TrainRecipe, [str(recipe), "--rank", "7", "--resume", "--json"], "train", "", recipe=True)
    assert (settings.rank, settings.batch_size, settings.schedule) == (7, 4, "linear")
    assert settings.resume
    assert as_json


class PlainTrainer(TrainerMixin, Trainer):
    pass


def test_mixin_with_a_plain_trainer(tmp_path, tiny_tokenizer):
    """m is trained without decay, checkpoints hold the adapter, every layer's norm is computed once a step."""
    model = tiny_llama()
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    rows, _ = encode_all(items(16), instruction.encode, tiny_tokenizer, 200)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2, weight_decay=0.5,
        remove_unused_columns=False, report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        save_steps=1, learning_rate=1e-2, logging_steps=1,
    )  # fmt: skip
    collator = AnswerCollator(0, model)
    trainer = PlainTrainer(model, arguments, data_collator=collator, train_dataset=rows)
    trainer.train()
    groups = {g["name"]: g for g in trainer.optimizer.param_groups}
    assert groups["magnitude"]["weight_decay"] == 0.0
    assert groups["factors"]["weight_decay"] == 0.5
    assert {layer.adapted.preparations for _, layer in doratune.adapters(model)} == {2}
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_mixin_wants_a_model():
    with pytest.raises(doratune.UserError, match="expected a model with an adapter, got None"):
        PlainTrainer(model_init=tiny_llama)


def test_mixin_with_trl(tmp_path, tiny_tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class DoRASFT(TrainerMixin, trl.SFTTrainer):
        pass

    model = tiny_llama()
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj", "v_proj"]))
    pairs = [{"prompt": instruction.prompt_of(item), "completion": item["output"]} for item in items(8)]
    settings = trl.SFTConfig(
        str(tmp_path), per_device_train_batch_size=2, max_steps=2, report_to=[], use_cpu=True, learning_rate=1e-2,
        dataloader_pin_memory=False, disable_tqdm=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DoRASFT(model, settings, train_dataset=Dataset.from_list(pairs), processing_class=tiny_tokenizer)
    trainer.train()
    moved = measure(model)
    assert moved.magnitude > 0
    assert moved.direction > 0
    trainer.save_model(str(tmp_path / "saved"))
    again = doratune.load(tiny_llama(), tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    model.eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_magnitude_that_did_not_move_is_a_warning():
    model = tiny_llama()
    doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["q_proj"]))
    assert "did not move" in measure(model).warning
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.magnitude.mul_(1.1)
    assert measure(model).warning is None
    assert measure(model).magnitude == pytest.approx(0.05, rel=1e-3)


def test_movement_is_the_dense_angle():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30)).double()
    doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["0"]))
    layer = model[0]
    for size in (1e-4, 1e-2, 1.0):
        with torch.no_grad():
            layer.lora_B.normal_(std=size)
        V = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
        cosine = torch.nn.functional.cosine_similarity(V, layer.weight, dim=1)
        assert measure(model).direction == pytest.approx((1 - cosine).mean().item(), rel=1e-4)


def test_the_line_of_a_run_is_the_analysis():
    """Exactly 0 at the start of every kind of layer on both axes; afterwards the mean over all rows of what analysis measures."""
    for kind, method, axis in grid.cells():
        if grid.outcome(kind, method, axis) is None:
            case, _ = grid.cell(kind, method, axis, torch.bfloat16)
            moved = measure(case.model)
            assert moved.magnitude == (0.0 if case.layer.adapted.magnitude else None), (kind, method, axis)
            grid.move(case.layer)
            moved, change = measure(case.model), adapter_changes(case.model)["layer"]
            if case.layer.adapted.magnitude:
                assert moved.magnitude == change.relative > 0.01
            assert moved.direction == (None if method == "magnitude only" else change.direction)
