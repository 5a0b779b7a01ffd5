"""What is trained over an fp16 base has the gradients of fp32: the loss is scaled, for every Trainer and method."""

import copy
import json

import pytest
import torch
from conftest import randomize, tiny_llama
from transformers import Trainer, TrainingArguments

import doratune
from doratune.cli.main import main
from doratune.training import TrainerMixin
from doratune.training.trainer import BaselineTrainer, FullTrainer


class Own(TrainerMixin, Trainer):
    pass


def attached(dtype, **config):
    model = tiny_llama().to(dtype)
    doratune.attach(model, doratune.AdapterConfig(**{"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]} | config))
    return randomize(model, scale=0.05)


def trainer_of(model, folder, cls=Own, rows=(), **more):
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    settings |= {"remove_unused_columns": False, "logging_steps": 1, "per_device_train_batch_size": 1} | more
    return cls(model, TrainingArguments(str(folder), **settings), train_dataset=list(rows))


def rows_of(count, tokens=64):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (tokens,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def gradients(model, folder, tokens: int, scaled: bool) -> dict[str, torch.Tensor]:
    """The gradients of one step, unscaled as the optimizer would see them; the loss is a mean over so many tokens."""
    trainer = trainer_of(model, folder)
    if not scaled:
        trainer.accelerator.scaler = None
    trainer.create_optimizer()
    optimizer = trainer.accelerator.prepare(trainer.optimizer)
    row = rows_of(1, min(tokens, 256))[0]
    loss = model(**{k: v[None] for k, v in row.items()}).loss * (min(tokens, 256) / tokens)  # its share of a mean over so many
    trainer.accelerator.backward(loss)
    if scaled:
        trainer.accelerator.unscale_gradients(optimizer)
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def median_error(one: dict, truth: dict) -> float:
    errors = [((one[name] - truth[name]).norm() / truth[name].norm()).item() for name in truth if truth[name].norm() > 0]
    return torch.tensor(errors).median().item()


@pytest.mark.parametrize("tokens", [64, 8192, 131_072])
def test_gradients_are_those_of_fp32(tokens, tmp_path):
    model = attached(torch.float16)
    truth = gradients(copy.deepcopy(model).float(), tmp_path, tokens, scaled=False)
    scaled = median_error(gradients(copy.deepcopy(model), tmp_path, tokens, scaled=True), truth)
    assert scaled < 0.01
    if tokens > 8192:
        assert median_error(gradients(copy.deepcopy(model), tmp_path, tokens, scaled=False), truth) > 5 * scaled


def test_a_scaler_where_it_is_needed_and_nowhere_else(tmp_path):
    for dtype, wanted in ((torch.float16, True), (torch.bfloat16, False), (torch.float32, False)):
        assert (trainer_of(attached(dtype), tmp_path).accelerator.scaler is not None) == wanted
    baseline = tiny_llama().half()
    doratune.baselines.attach(baseline, doratune.baselines.BaselineConfig(method="series", size=4))
    assert trainer_of(baseline, tmp_path, BaselineTrainer).accelerator.scaler is not None
    assert trainer_of(tiny_llama(), tmp_path, FullTrainer).accelerator.scaler is None
    with pytest.warns(UserWarning, match="is not scaled .*load it in bfloat16"):
        assert trainer_of(tiny_llama().half(), tmp_path, FullTrainer).accelerator.scaler is None


def test_the_first_output_is_the_base_s_bit_for_bit_and_stays_in_fp16(tmp_path):
    base, ids = tiny_llama().half(), torch.tensor([[5, 6, 7, 8]])
    model = copy.deepcopy(base)
    doratune.attach(model, doratune.AdapterConfig(rank=4))
    trainer = trainer_of(model, tmp_path)
    prepared = trainer.accelerator.prepare_model(trainer.model)
    with torch.no_grad():
        assert prepared(input_ids=ids).logits.dtype == torch.float16
        assert torch.equal(prepared(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_steps_are_those_of_fp32(clip, tmp_path):
    """Clipping and the norm that is logged see the gradients as they are."""
    logs = {}
    for dtype in (torch.float16, torch.float32):
        model = attached(torch.float16).to(dtype)
        trainer = trainer_of(model, tmp_path, rows=rows_of(6), max_steps=4, learning_rate=1e-3, max_grad_norm=clip)
        trainer.train()
        logs[dtype] = [row for row in trainer.state.log_history if "grad_norm" in row]
    half, whole = logs[torch.float16], logs[torch.float32]
    assert len(half) == len(whole) == 4
    for a, b in zip(half, whole):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.02)
        assert a["loss"] == pytest.approx(b["loss"], rel=0.01)


def test_steps_that_overflow_are_left_out(tmp_path):
    model = attached(torch.float16)
    trainer = trainer_of(model, tmp_path, rows=rows_of(4), max_steps=3, learning_rate=1e-2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # the first steps overflow
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert trainer.accelerator.scaler.get_scale() < 2.0**40
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)  # all three were left out


def test_a_run_and_its_resumed_half_are_one(tiny_folder, tmp_path):
    from safetensors.torch import load_file

    items = [{"instruction": f"Is {n} even?", "output": ("true", "false")[n % 2]} for n in range(16)]
    (tmp_path / "data.json").write_text(json.dumps(items))
    words = ["train", "--model", str(tiny_folder), "--data", str(tmp_path / "data.json"), "--rank", "4", "--lr", "1e-3"]
    words += ["--batch_size", "4", "--dtype", "float16", "--tensorboard", "false", "--schedule", "constant", "--log_steps", "1"]
    assert main([*words, "--output", str(tmp_path / "whole"), "--epochs", "2"]) == 0
    assert main([*words, "--output", str(tmp_path / "parts")]) == 0
    assert main([*words, "--output", str(tmp_path / "parts"), "--resume", "--epochs", "2"]) == 0
    a, b = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert list((tmp_path / "parts").glob("checkpoint-*/scaler.pt"))


def test_full_fine_tuning_in_fp16_without_a_gpu_is_one_line(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 4))
    words = ["train", "--model", str(tiny_folder), "--data", str(tmp_path / "data.json"), "--output", str(tmp_path / "run")]
    assert main([*words, "--method", "full", "--dtype", "float16"]) == 2
    assert "set dtype: bfloat16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
