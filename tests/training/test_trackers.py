"""`report_to`: what arrives in the files of each tracker that is installed; one that cannot begin, that fails, that is missing."""

import importlib.util
import json
import sqlite3
import struct
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from doratune.cli.main import main
from doratune.errors import UserError
from doratune.support.packages import install_line
from doratune.training.recipe import TrainRecipe
from doratune.training.trackers import Tracker
from doratune.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore")
WANTED = {"train/loss", "train/learning_rate", "train/grad_norm", "train/magnitude_moved", "eval/loss"}


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the trackers write: no server, no account."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        for name, module in list(sys.modules.items()):  # read when it was imported, perhaps by another test
            if name.partition(".")[0] == "trackio" and "TRACKIO_DIR" in vars(module):
                patch.setattr(module, "TRACKIO_DIR", folder / "trackio")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_TRACKING_URI", (folder / "mlruns").as_uri())
        yield folder


@pytest.fixture(scope="module")
def recipe(tiny_folder, place):
    """recipe(name, …) of five steps, evaluated at the third and the last."""
    rows = [{"instruction": f"Is {i} even?", "output": f"it is {('true', 'false')[i % 2]}"} for i in range(12)]
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def of(name, **settings):
        short = {"rank": 2, "dtype": "float32", "batch_size": 2, "max_steps": 5, "eval_steps": 3, "tensorboard": False}
        files = {"model": str(tiny_folder), "data": str(data), "eval_data": str(data), "output": str(place / name)}
        return TrainRecipe(**files | short | settings)

    return of


@pytest.fixture(scope="module")
def trained(recipe):
    """metrics.json of two trainings of one process, which report to every tracker that is installed."""
    here = [name for name in READERS if importlib.util.find_spec(name) is not None]
    return {name: train(recipe(name, report_to=here), say=lambda line: None) for name in ("first", "second")}


def records(path, block=32768):
    """The records of a .wandb file: seven bytes of header, then LevelDB's log format (checksum, length, type of a part)."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def in_wandb(place):
    """run → {metric: its values}, from the runs' own files."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = {}
    for path in place.glob("wandb/offline-run-*/run-*.wandb"):
        name, values = None, {}
        for one in map(Record.FromString, records(path)):
            name = one.run.display_name or name
            for item in one.history.item:
                values.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
        runs[name] = values
    return runs


def in_mlflow(place):
    from mlflow import MlflowClient

    client, runs = MlflowClient((place / "mlruns").as_uri()), {}
    for run in client.search_runs(["0"]):
        history = {key: [m.value for m in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
        prefixes = {key: "eval/" + key[5:] if key.startswith("eval_") else f"train/{key}" for key in history}
        runs[run.info.run_name] = {prefixes[key]: values for key, values in history.items()} | {"status": run.info.status}
    return runs


def in_trackio(place):
    with sqlite3.connect(place / "trackio" / "huggingface.db") as base:
        rows = base.execute("select run_name, metrics from metrics order by id").fetchall()
    runs = {}
    for name, text in rows:
        for key, value in json.loads(text).items():
            runs.setdefault(name, {}).setdefault(key, []).append(value)
    return runs


READERS = {"wandb": in_wandb, "mlflow": in_mlflow, "trackio": in_trackio}


@pytest.mark.parametrize("tracker", [pytest.param(name, marks=installed(name)) for name in READERS])
def test_figures_arrive_and_each_training_has_a_run_of_its_own(tracker, trained, place):
    """Also those of the last evaluation, which is at no multiple of eval_steps."""
    runs = READERS[tracker](place)
    assert {"first", "second"} <= set(runs)
    for name, metrics in trained.items():
        assert set(runs[name]) >= WANTED
        for key in ("loss", "learning_rate", "grad_norm", "magnitude_moved"):
            assert runs[name][f"train/{key}"] == pytest.approx([row[key] for row in metrics["log"] if "loss" in row], rel=1e-5)
        assert runs[name]["train/magnitude_moved"][-1] > 0
        evaluated = [row["eval_loss"] for row in metrics["log"] if "eval_loss" in row]
        assert runs[name]["eval/loss"] == pytest.approx(evaluated, rel=1e-5) and len(evaluated) == 2


@installed("mlflow")
def test_a_run_that_fails_is_a_failed_one_and_a_run_of_the_caller_goes_on(recipe, place):
    import mlflow

    spoiled = recipe("spoiled", report_to=["mlflow"], lr=1e38, optimizer="sgd", max_grad_norm=0, max_steps=20)
    with pytest.raises(UserError, match=r"the loss is|hold NaN"):
        train(spoiled, say=lambda line: None)
    assert mlflow.active_run() is None and in_mlflow(place)["spoiled"]["status"] == "FAILED"
    with mlflow.start_run(run_name="mine") as mine:
        train(recipe("inside", report_to=["mlflow"]), say=lambda line: None)
        assert mlflow.active_run().info.run_id == mine.info.run_id
    assert set(in_mlflow(place)["mine"]) >= WANTED


CANNOT = [
    pytest.param("tensorboard", {"TENSORBOARD_LOGGING_DIR": "FILE"}, id="tensorboard"),
    pytest.param("mlflow", {"MLFLOW_TRACKING_URI": "nowhere://x"}, id="mlflow", marks=installed("mlflow")),
    pytest.param("mlflow", {"MLFLOW_RUN_ID": "f00"}, id="mlflow's run", marks=installed("mlflow")),
]


@pytest.mark.parametrize(("tracker", "environment"), CANNOT)
def test_one_that_cannot_begin_is_one_line(tracker, environment, recipe, place, tmp_path, monkeypatch, capsys):
    (tmp_path / "a file").write_text("")
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("FILE", str(tmp_path / "a file")))
    one = recipe(tmp_path.name)
    words = ["--model", one.model, "--data", one.data, "--output", one.output, "--rank", "2", "--dtype", "float32"]
    assert main(["train", *words, "--max_steps", "2", "--tensorboard", "false", "--report_to", tracker]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "doratune train: " in line]
    assert (
        len(error) == 1 and f"report_to is {tracker}, which cannot begin: " in error[0] and "leave it out of report_to" in error[0]
    )
    assert not (Path(one.output) / "adapter").exists()


class Full(TrainerCallback):
    """A tracker whose disk is full from the second line on."""

    lines = 0

    def on_log(self, args, state, control, **kwargs):
        self.lines += 1
        if self.lines > 1:
            raise OSError(28, "No space left on device")


def test_one_that_fails_on_the_way_is_said_once_and_left_out():
    said, inner = [], Full()
    tracker = Tracker("trackio", inner, said.append)
    for _ in range(4):
        tracker.on_log(None, None, None, logs={"loss": 1.0})
    assert inner.lines == 2 and len(said) == 1
    assert "report_to is trackio, which takes no more figures of this run" in said[0] and "No space left" in said[0]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_one_that_is_not_installed_is_one_line(tracker, recipe, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == tracker else there(name, *rest))
    with pytest.raises(UserError) as error:
        train(recipe("run", report_to=[tracker]))
    assert str(error.value) == f"report_to is {tracker}, which is not installed; run: {install_line(tracker)}"
