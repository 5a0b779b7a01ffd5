"""Runs that are watched: the best checkpoint, an early stop, answers to fixed prompts, warnings, trackers, where each run is."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file

import doratune
from doratune.cli.main import main
from doratune.data import DataSettings
from doratune.data.encode import AnswerCollator, encode_all, prompt_ids
from doratune.data.formats import format_named
from doratune.training.alarms import Alarms, last_warning
from doratune.training.movement import Movement, magnitude_moved, measure
from doratune.training.samples import asked
from doratune.training.status import runs_in
from doratune.training.token_loss import TokenLoss


def items(count=24, right=True):
    answers = ("true", "false")
    return [{"instruction": f"Is {i} even?", "output": f"it is {answers[(i + (not right)) % 2]}"} for i in range(count)]


def written(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


@pytest.fixture
def run(tiny_folder, tmp_path):
    """train(folder's name, flags…) → (exit status, metrics.json or {})."""
    data = written(tmp_path / "data.jsonl", items())
    other = written(tmp_path / "other.jsonl", items(8, right=False))
    shared = ["--model", str(tiny_folder), "--data", data, "--rank", "2", "--dtype", "float32", "--batch_size", "4"]
    shared += ["--tensorboard", "false", "--eval_data", other, "--schedule", "constant"]

    def train(name, *flags):
        output = tmp_path / name
        status = main(["train", "--output", str(output), *shared, *flags])
        metrics = output / "metrics.json"
        return status, json.loads(metrics.read_text()) if metrics.exists() else {}

    train.folder, train.shared = tmp_path, shared
    return train


def evaluated(metrics, key="eval_loss"):
    return {row["step"]: row[key] for row in metrics["log"] if key in row}


WORSENING = ["--lr", "0.05", "--epochs", "40", "--eval_steps", "3"]
"""The evaluation data says the opposite of the training data: its loss falls while the form is learned, then rises."""


@pytest.mark.parametrize("method", ["dora", "full", "series"])
def test_the_best_checkpoint_is_the_result(method, run):
    more = ["--lr", "0.01"] if method != "dora" else []
    status, metrics = run("run", *WORSENING, *more, "--method", method, "--best_by", "loss", "--early_stopping", "2")
    losses = evaluated(metrics)
    best = min(losses, key=losses.get)
    assert status == 0 and metrics["best_step"] == best and metrics["eval_loss"] == losses[best]
    assert metrics["steps"] == best + 6 < 240  # two evaluations more, then it stops
    output = run.folder / "run"
    result = output / ("model" if method == "full" else "adapter")
    file = next(result.glob("*.safetensors"))
    kept, last = (load_file(next((output / f"checkpoint-{step}").glob(file.name))) for step in (best, metrics["steps"]))
    saved = load_file(file)
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


def test_by_the_accuracy_of_tokens(run):
    _, metrics = run("run", *WORSENING, "--max_steps", "9", "--best_by", "token_accuracy")
    accuracies = evaluated(metrics, "eval_token_accuracy")
    assert list(accuracies) == [3, 6, 9]
    assert metrics["eval_token_accuracy"] == max(accuracies.values()) == accuracies[metrics["best_step"]]


def test_the_last_step_can_be_the_best(run):
    """10 steps, evaluated every 4: the run ends with an evaluation and a checkpoint of step 10."""
    data = run.shared[run.shared.index("--data") + 1]
    _, metrics = run("run", "--lr", "1e-3", "--max_steps", "10", "--eval_steps", "4", "--best_by", "loss", "--eval_data", data)
    assert list(evaluated(metrics)) == [4, 8, 10] and metrics["best_step"] == 10


def test_the_accuracy_of_tokens_is_a_mean_over_them(tiny_tokenizer):
    model = tiny_llama()
    rows, _ = encode_all(items(7), lambda item, t: format_named("instruction").encode(item, t, DataSettings()), tiny_tokenizer, 256)
    collate, shares = AnswerCollator(0, model), []
    for size in (1, 3, 7):
        total = TokenLoss()
        for start in range(0, 7, size):
            batch = collate(rows[start : start + size])
            with torch.no_grad():
                outputs = model(**batch)
            total.add(outputs.loss, outputs, batch["labels"], lambda t: t)
        shares.append(total.accuracy())
    right = count = 0
    for row in rows:
        with torch.no_grad():
            chosen = model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        for token, label in zip(chosen, row["labels"][1:]):
            right, count = right + (label == token), count + (label != -100)
    assert shares == pytest.approx([right / count] * 3)


REFUSED = [
    (["--best_by", "loss", "--eval_data", "null"], "nothing is evaluated; give eval_data or eval_size"),
    (["--early_stopping", "2"], "best_by is none; set best_by: loss"),
    (["--best_by", "loss", "--eval_steps", "4", "--save_steps", "3"], "leave save_steps out"),
    (["--best_by", "accuracy"], "did you mean 'token_accuracy'"),
    (["--sample_prompts", "['']"], "holds an empty text"),
    (["--sample_prompts", "[say </s>]"], "special token"),
    (["--report_to", "wandbb"], "did you mean 'wandb'"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_what_is_refused_is_said_before_the_training(flags, message, run, capsys):
    status, metrics = run("run", *flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (status, metrics) == (2, {}) and message in error
    assert not (run.folder / "run" / "adapter").exists()


def test_answers_to_fixed_prompts_change_nothing_in_the_training(run, capsys):
    flags = ["--lr", "5e-3", "--max_steps", "6", "--dropout", "0.1", "--log_steps", "1", "--eval_data", "null"]
    _, plain = run("plain", *flags)
    _, sampled = run("sampled", *flags, "--sample_prompts", "Is 3 even?", "Is 5 even, or not?", "--sample_steps", "4")
    losses = [[row["loss"] for row in metrics["log"] if "loss" in row] for metrics in (plain, sampled)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert [(s["step"], s["prompt"]) for s in sampled["samples"]] == [
        (step, prompt) for step in (0, 4, 6) for prompt in ("Is 3 even?", "Is 5 even, or not?")
    ]
    said = capsys.readouterr()
    assert plain["samples"] == [] and "step 4: 'Is 3 even?' -> " in said.out
    assert "/6" not in said.out  # the bar's line is another one


def test_a_resumed_run_takes_what_only_reports_or_stops_that_it_had_not(run):
    """Callbacks with a state that the checkpoint does not know: samples, an early stop."""
    flags = ["--eval_steps", "2", "--max_steps", "4"]
    assert run("run", *flags)[0] == 0
    more = [
        "--max_steps",
        "8",
        "--sample_prompts",
        "Is 4 even?",
        "--sample_steps",
        "2",
        "--best_by",
        "loss",
        "--early_stopping",
        "9",
    ]
    status, metrics = run("run", "--eval_steps", "2", *more, "--resume")
    assert status == 0 and {sample["step"] for sample in metrics["samples"]} == {6, 8}


def test_answers_are_the_adapter_s_own_and_outlive_a_resume(run, tiny_tokenizer):
    flags = [
        "--lr",
        "2e-2",
        "--eval_data",
        "null",
        "--sample_prompts",
        "Is 3 even?",
        "--sample_steps",
        "4",
        "--sample_tokens",
        "8",
    ]
    run("run", *flags, "--max_steps", "4")
    _, metrics = run("run", *flags, "--max_steps", "8", "--resume")
    assert [sample["step"] for sample in metrics["samples"]] == [0, 4, 8]
    model = doratune.load(tiny_llama(), run.folder / "run" / "adapter")
    kind = format_named("instruction")
    ids = prompt_ids(kind.encode({"instruction": "Is 3 even?", "output": "x"}, tiny_tokenizer, DataSettings()), tiny_tokenizer)
    out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert metrics["samples"][-1]["output"] == tiny_tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


ASKED = {
    "chat": "[user]why?</s>[assistant]",
    "sharegpt": "[user]why?</s>[assistant]",
    "completion": "why?",
    "text": "why?",
    "questions": "###Question:\nwhy?\n###Answer:\n",
    "instruction": "### Instruction:\nwhy?\n\n### Response:\n",
}


@pytest.mark.parametrize("kind", ASKED)
def test_a_prompt_is_asked_as_the_data_asks(kind, tiny_tokenizer):
    text = tiny_tokenizer.decode(asked("why?", format_named(kind), tiny_tokenizer, DataSettings()))
    assert text.endswith(ASKED[kind])


@pytest.mark.parametrize(("steps", "logged"), [(3, 3), (30, 30), (45, 23), (8, 8)])
def test_a_short_run_shows_its_loss(steps, logged, run):
    _, metrics = run("run", "--lr", "1e-3", "--max_steps", str(steps), "--eval_data", "null")
    assert len([row for row in metrics["log"] if "loss" in row]) in (logged, logged - 1)
    assert (run.folder / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_shorter_than_its_log_shows_its_loss_once(run):
    _, metrics = run("run", "--lr", "1e-3", "--max_steps", "3", "--log_steps", "7", "--eval_data", "null")
    assert [row["step"] for row in metrics["log"]] == [3]


def test_the_line_of_progress(run, capsys):
    run("run", "--lr", "1e-3", "--max_steps", "4", "--eval_steps", "2")
    said = capsys.readouterr()
    line = said.err
    for word in ("loss=", "lr=0.001", "|g|=", "|Δm|=", "tokens/s=", "GiB="):
        assert word in line, word
    assert "step 2: evaluation loss" in said.out and "% of tokens" in said.out


def test_the_moved_magnitude_is_that_of_the_end():
    model = doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj", "v_proj"]))
    assert magnitude_moved(model) == 0
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            layer.magnitude.mul_(1.03)
    assert magnitude_moved(model) == pytest.approx(measure(model).magnitude, rel=1e-5) == pytest.approx(0.03, rel=1e-4)
    assert magnitude_moved(tiny_llama()) is None


def test_a_rate_that_moves_nothing_is_warned_of(run, capsys):
    _, metrics = run("run", "--lr", "1e-8", "--max_steps", "3", "--eval_data", "null")
    assert "the magnitude moved" in metrics["warning"] and "raise lr" in metrics["warning"]
    assert f"warning: {metrics['warning']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("moved", "losses", "words"),
    [
        (Movement(0.0, 0.1), [2.0, 1.0], "did not move"),
        (Movement(0.02, 0.1), [2.0] * 30, "has not fallen"),
        (Movement(0.02, 0.1), [1.0] * 15 + [2.0] * 15, "has not fallen"),
        (None, [2.0] * 30, "has not fallen"),
        (Movement(5e-5, 0.1), [2.0, 1.0], "the magnitude moved 0.005 %"),
        (Movement(0.02, 0.1), [3.0 - i / 20 for i in range(30)], None),
        (Movement(None, 0.1), [2.0] * 5, None),
    ],
)
def test_warnings_at_the_end(moved, losses, words, run):
    warning = last_warning(moved, [{"step": i, "loss": loss} for i, loss in enumerate(losses)], 30, 1e-4)
    assert warning is None if words is None else words in warning


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"loss": 0.0}], "the loss is 0"),
        ([{"eval_loss": 1.0}, {"eval_loss": 1.1}, {"eval_loss": 1.2}, {"eval_loss": 1.3}], "the evaluation loss worsens: 1.0000"),
        ([{"eval_loss": 1.0}, {"eval_loss": 1.1}, {"eval_loss": 0.9}], None),
        ([{"loss": 0.5}], None),
    ],
)
def test_warnings_on_the_way(rows, words):
    from transformers import TrainerState

    said = []
    alarms = Alarms(said.append)
    for step, row in enumerate(rows, 1):
        alarms.on_log(None, TrainerState(global_step=step), None, logs=row)
    assert said == [] if words is None else len(said) == 1 and words in said[0]


def statuses(folder):
    return {entry.folder.name: entry for entry in runs_in(folder)}


def started(run, name, *flags):
    """A run of its own process that does not end by itself."""
    words = [*run.shared, "--output", str(run.folder / name), *flags, "--epochs", "100000"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "doratune", "train", *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def test_runs_say_where_they_are_and_a_signal_keeps_the_last_checkpoint_beside_the_best(run, capsys):
    """Stopped in the middle, a run goes on with its last step: nothing that was trained is trained again."""
    run("done", "--lr", "1e-3", "--max_steps", "2")
    status, _ = run("spoiled", "--lr", "1e38", "--optimizer", "sgd", "--max_steps", "20", "--max_grad_norm", "0")
    assert status == 2
    process, folder = started(run, "going", *WORSENING, "--best_by", "loss"), run.folder / "going"
    try:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and process.poll() is None and len(list(folder.glob("checkpoint-*"))) < 2:
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()[-2000:]
        going, left = statuses(run.folder)["going"], (folder / "status.json").read_text()
        assert going.status == "running" and going.steps > going.step and str(process.pid) in going.note
    finally:
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=600)
    assert process.returncode == 143, error[-2000:]
    named = error.strip().splitlines()[-1].split("/")[-1].split(" ")[0]
    state = json.loads((folder / named / "trainer_state.json").read_text())
    assert named == f"checkpoint-{state['global_step']}"
    after = statuses(run.folder)
    assert (after["done"].status, after["done"].step) == ("finished", 2)
    assert after["spoiled"].status == "failed" and "loss" in after["spoiled"].note
    assert after["going"].status == "interrupted" and "--resume" in after["going"].note
    (folder / "status.json").write_text(left)  # as a process leaves it that is killed
    assert statuses(run.folder)["going"].status == "interrupted"
    capsys.readouterr()
    assert main(["runs", str(run.folder), "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert {row["status"] for row in json.loads(out[-1])} == {"finished", "failed", "interrupted"}
    assert any("interrupted" in line and "going" in line for line in out)


def test_runs_of_a_folder_without_any(tmp_path, capsys):
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("model: x\n")
    assert main(["runs", str(tmp_path)]) == 0 and "holds no runs" in capsys.readouterr().out
