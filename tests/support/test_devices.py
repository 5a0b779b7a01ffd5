"""--device: what is here is used, what is not is one line before anything is loaded."""

import json

import pytest
import torch

from doratune.cli.main import main
from doratune.errors import UserError
from doratune.support.devices import device_of
from doratune.support.models import load_model

ACCELERATOR = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None
COMMANDS = {
    "train": ["--data", "items.json", "--model", "MODEL"],
    "evaluate": ["--task", "items.json", "--model", "MODEL"],
    "generate": ["--prompt", "one", "--model", "MODEL"],
    "chat": ["--model", "MODEL"],
    "serve": ["--model", "MODEL", "--port", "0"],
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    items = [{"instruction": f"Is {i} even?", "input": "", "output": "true", "answer": "true"} for i in range(4)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    monkeypatch.chdir(tmp_path)


def words(command, folder, *more):
    return [command, *(str(folder) if word == "MODEL" else word for word in COMMANDS[command]), *more]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", [name for name in ("cuda", "mps", "xpu") if name != ACCELERATOR])
def test_an_accelerator_that_is_not_here(command, device, desk, tiny_folder, capsys):
    assert main(words(command, tiny_folder, "--device", device)) == 2
    assert f"device is '{device}', but torch {torch.__version__} has" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", ["tpu", "gpu", "cuda:9", "CPU"])
def test_what_is_no_device(command, device, desk, tiny_folder, capsys):
    assert main(words(command, tiny_folder, "--device", device)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"device is {device!r}; expected one of auto, cpu, cuda, mps, xpu" in line


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_commands_run_on_it(device, desk, tiny_folder, capsys):
    train = ["--max_steps", "1", "--batch_size", "2", "--targets", "[q_proj]", "--rank", "2", "--output", "run"]
    assert main(words("train", tiny_folder, "--device", device, *train)) == 0
    adapter = ["--adapter", "run/adapter", "--device", device]
    assert main(["generate", *adapter, "--prompt", "one", "--max_new_tokens", "2"]) == 0
    assert main(["evaluate", *adapter, "--task", "items.json", "--protocol", "likelihood", "--output", "scores"]) == 0


def test_auto_is_the_accelerator_or_the_cpu(tiny_folder):
    assert device_of("auto").type == (ACCELERATOR or "cpu") and device_of("cpu").type == "cpu"
    assert load_model(str(tiny_folder), device="auto").device.type == (ACCELERATOR or "cpu")
    assert load_model(str(tiny_folder), device="cpu").device.type == "cpu"
    with pytest.raises(UserError, match="device is 'nowhere', but torch"):
        device_of("nowhere")


def test_a_quantized_model_goes_where_it_is_asked(tiny_folder):
    pytest.importorskip("bitsandbytes")
    model = load_model(str(tiny_folder), "bfloat16", "nf4", device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_resumed_run_may_go_on_elsewhere(desk, tiny_folder):
    common = [
        "--batch_size",
        "2",
        "--targets",
        "[q_proj]",
        "--rank",
        "2",
        "--output",
        "run",
        "--schedule",
        "constant",
        "--dtype",
        "float32",
    ]
    assert main(words("train", tiny_folder, "--device", "cpu", "--max_steps", "1", *common)) == 0
    assert main(words("train", tiny_folder, "--device", "auto", "--max_steps", "2", "--resume", *common)) == 0
