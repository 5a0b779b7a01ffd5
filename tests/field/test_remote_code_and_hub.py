"""A model folder's own code is run for --trust_remote_code alone, whatever stands on standard input; a hub is asked once."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import tiny_llama

import doratune.support.hub as hub
from doratune.cli.main import main
from doratune.data import load_items
from doratune.errors import UserError
from doratune.support.models import load_model, load_tokenizer

CODE = """
import pathlib
pathlib.Path(r"{mark}").write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own-model"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def foreign(tmp_path, tiny_tokenizer):
    """(a model folder that brings code for its configuration, model and tokenizer; the file that the code leaves when it runs)."""
    folder, mark = tmp_path / "model", tmp_path / "ran.txt"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(mark=mark))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-model", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder, mark


def commands(folder, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a", "output": "true", "answer": "true"}] * 4))
    data, output = str(tmp_path / "data.json"), str(tmp_path / "out")
    (tmp_path / "adapter").mkdir(exist_ok=True)
    return {
        "train": ["--model", str(folder), "--data", data, "--output", output],
        "evaluate": ["--model", str(folder), "--task", data, "--output", output],
        "inspect": ["--model", str(folder)],
        "analyze": [str(folder), "--model", str(folder), "--output", output],
        "demo": ["--model", str(folder), "--output", output],
        "bench": ["--model", str(folder), "--what", "memory", "--output", output],
    }


@pytest.mark.parametrize("command", ["train", "evaluate", "inspect", "analyze", "demo", "bench"])
def test_code_of_a_folder_is_not_run_and_nothing_is_asked(command, foreign, tmp_path, capsys, monkeypatch):
    folder, mark = foreign
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("standard input was asked"))
    assert main([command, *commands(folder, tmp_path)[command]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "brings Python code of its own, which is not run" in error and "--trust_remote_code" in error
    assert not mark.exists()


def test_yes_on_standard_input_runs_nothing(foreign):
    folder, mark = foreign
    command = [sys.executable, "-m", "doratune.cli", "inspect", "--model", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 2 and "is not run" in result.stderr
    assert not mark.exists()


def test_loading_by_hand(foreign):
    folder, mark = foreign
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match="is not run"):
            load(str(folder))
    assert not mark.exists()


def test_with_the_flag_it_runs(foreign, tmp_path, capsys):
    folder, mark = foreign
    assert main(["inspect", "--model", str(folder), "--trust_remote_code"]) == 0
    assert mark.read_text() == "ran"
    words = ["train", *commands(folder, tmp_path)["train"], "--max_steps", "1", "--rank", "2", "--dtype", "float32"]
    assert main([*words, "--tensorboard", "false", "--trust_remote_code"]) == 0


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub at a port where nobody listens."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["nofolder", "owner/nofolder"])
def test_a_hub_that_does_not_answer_is_said_at_once(name, silent_hub, capsys):
    for command in (["inspect", "--model", name], ["evaluate", "--model", name, "--task", "demo"]):
        started = time.perf_counter()
        assert main(command) == 2
        assert time.perf_counter() - started < 20
        error = capsys.readouterr().err
        assert f"{name}: no such model folder, and the hub at http://127.0.0.1:9 does not answer" in error
    with pytest.raises(UserError, match="no such file, and the hub"):
        load_items("owner/nofolder")


@pytest.mark.parametrize("name", ["no folder", "-x", "a--b", "x" * 200, "näme", "a..b", "owner/.x"])
def test_a_name_that_no_hub_can_have(name, silent_hub, capsys):
    started = time.perf_counter()
    assert main(["inspect", "--model", name]) == 2
    assert time.perf_counter() - started < 10
    assert "no such model folder, and it can be no hub id" in capsys.readouterr().err


def test_a_hub_that_says_no_is_left_to_its_client(monkeypatch):
    """404 is an answer; the client knows about tokens and private models."""
    import http.server
    import threading

    from huggingface_hub import constants

    class No(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), No)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert hub.hub_settings("owner/name") == {}
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ["nofolder", "nobody/nothing", "a/b/c", "./nofolder"])
@pytest.mark.parametrize(
    "words",
    [
        ["inspect"],
        ["generate", "--prompt", "x"],
        ["chat"],
        ["export", "--output", "OUT"],
        ["evaluate", "--task", "TASK", "--output", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_a_model_that_is_nowhere_is_a_line_with_the_fix(words, name, tmp_path, capsys):
    (tmp_path / "task.json").write_text('[{"instruction": "x", "output": "the correct answer is true", "answer": "true"}]')
    places = {"OUT": str(tmp_path / "out"), "TASK": str(tmp_path / "task.json")}
    assert main([*(places.get(word, word) for word in words), "--model", name]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"doratune {words[0]}: ") and name in error and "folder" in error and "hub id" in error
    assert not (tmp_path / "out").exists()
