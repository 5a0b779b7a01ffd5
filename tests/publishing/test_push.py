"""doratune push, in processes of its own, against a hub on this machine."""

import json
import os
import subprocess
import sys

import pytest
from conftest import randomize, tiny_llama
from hub import Hub

import doratune
from doratune.publishing.push import parcel


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    model = tiny_llama()
    model.config._name_or_path = "owner/base"
    doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["q_proj"]))
    folder = tmp_path_factory.mktemp("run") / "adapter"
    doratune.save(randomize(model), folder)
    (folder / "README.md").write_text("# mine\n<!-- scores -->\n<!-- /scores -->\n")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / ".env").write_text("TOKEN=secret")
    return folder


@pytest.fixture
def push(tmp_path_factory):
    """Run the command as a user without a cache or a login."""
    home = tmp_path_factory.mktemp("home")
    return lambda *arguments, token="hf_x": run_push(home, *arguments, token=token)


def run_push(home, hub_address, *arguments, token):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub_address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": "/nonexistent",
    }
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "doratune", "push", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_an_adapter_arrives_whole_and_private_and_nothing_else_does(adapter, push, tmp_path):
    with Hub() as hub:
        run = push(hub.address, "--folder", adapter, "--to", "me/mine", "--json")
        assert run.returncode == 0, run.stderr
        repository = hub.repositories["me/mine"]
    sent = {path.name for path in adapter.iterdir()} - {"training_args.bin", "optimizer.pt", ".env", ".doratune"}
    assert repository["private"] is True and repository["files"].keys() == sent
    assert all(repository["files"][name] == (adapter / name).read_bytes() for name in sent)
    assert set(json.loads(run.stdout.splitlines()[-1])["files"]) == sent and "stays here: " in run.stdout
    for name, content in repository["files"].items():
        (tmp_path / name).write_bytes(content)
    doratune.load(tiny_llama(), tmp_path)


def test_a_public_branch_with_a_message_and_scores(adapter, push, tmp_path):
    figure = {"task": "boolq", "protocol": "generate", "total": 20, "accuracy": 0.5, "standard_error": 0.1}
    (tmp_path / "results.json").write_text(json.dumps({"results": [figure]}))
    options = ["--private", "false", "--message", "first words", "--revision", "side", "--results", str(tmp_path)]
    with Hub() as hub:
        run = push(hub.address, "--folder", adapter, "--to", "me/mine", *options)
        assert run.returncode == 0, run.stderr
        repository = hub.repositories["me/mine"]
    assert repository["private"] is False and repository["messages"] == ["side: first words"]
    assert b"| boolq | generate | 20 | 50.0 %" in repository["files"]["README.md"]


def test_a_dry_run_asks_nobody(adapter, push):
    with Hub() as hub:
        run = push(hub.address, "--folder", adapter, "--to", "me/mine", "--dry_run", "true", token=None)
        assert run.returncode == 0 and "dry run" in run.stdout and "adapter_model.safetensors" in run.stdout
        assert hub.asked == []


@pytest.mark.parametrize(
    ("status", "words"), [(401, "Invalid username or password."), (403, "You don't have the rights"), (400, "quota")]
)
def test_what_a_hub_refuses_is_one_line(adapter, push, status, words):
    with Hub() as hub:
        hub.refusal = (status, words)
        run = push(hub.address, "--folder", adapter, "--to", "me/mine")
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert words in run.stderr and ("HF_TOKEN" in run.stderr) == (status in (401, 403))


def test_a_hub_that_does_not_answer_is_one_line(adapter, push):
    run = push("http://127.0.0.1:9", "--folder", adapter, "--to", "me/mine")
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and "does not answer" in run.stderr


@pytest.mark.parametrize("name", ["a/b/c", "me/mi ne", "-x", "me/"])
def test_a_name_that_no_hub_takes_is_refused(adapter, push, name):
    with Hub() as hub:
        run = push(hub.address, "--folder", adapter, f"--to={name}")
        assert run.returncode == 2 and "give owner/name" in run.stderr and hub.asked == []


def test_folders_that_are_no_result_are_refused(adapter, tmp_path):
    with pytest.raises(doratune.UserError, match="no such folder"):
        parcel(tmp_path / "nowhere")
    with pytest.raises(doratune.UserError, match=r"no adapter or model; did you mean .*adapter\?"):
        parcel(adapter.parent)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(doratune.UserError, match=r"no \.safetensors file"):
        parcel(tmp_path)


def test_an_adapter_over_a_folder_of_this_machine_is_refused(adapter, tmp_path):
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for base in (str(tmp_path), "/somewhere/else"):
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(doratune.UserError, match="a path of this machine"):
            parcel(tmp_path)
