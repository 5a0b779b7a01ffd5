"""Pushing as trainers and models do it, in a process of its own, against a hub on this machine: what arrives is the adapter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_llama
from hub import Hub

import doratune

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from conftest import small_tokenizer
import doratune, torch, trl
folder = sys.argv[2]
ids = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)}] * 8
pairs = Dataset.from_list([{"prompt": f"is {i} true", "chosen": "true", "rejected": "false"} for i in range(8)])

def loaded():
    return doratune.load(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/adapter", trainable=True)

def settings(way):
    return dict(output_dir=f"{folder}/{way}", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_steps=1,
                save_strategy="no", learning_rate=0.0, hub_model_id=f"me/{way}", hub_token="hf_x", push_to_hub=True,
                gradient_checkpointing=False)

loaded().push_to_hub("me/model", token="hf_x")
doratune.as_peft(loaded()).push_to_hub("me/view", token="hf_x")
for trainer in (
    Trainer(loaded(), TrainingArguments(**settings("Trainer")), train_dataset=ids),
    trl.DPOTrainer(doratune.as_peft(loaded()), args=trl.DPOConfig(**settings("TRL")), train_dataset=pairs,
                   processing_class=small_tokenizer()),
):
    trainer.train()
    trainer.push_to_hub()
"""


def test_the_adapter_arrives(tmp_path):
    pytest.importorskip("trl")
    tiny_llama().save_pretrained(tmp_path / "base")
    model = randomize(doratune.attach(tiny_llama(), doratune.AdapterConfig(rank=2, targets=["q_proj"])))
    doratune.save(model, tmp_path / "adapter")
    with Hub() as hub:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"OMP_NUM_THREADS": "1"}
        environment |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
        words = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1]), str(tmp_path)]
        run = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)
        assert run.returncode == 0, run.stderr[-3000:]
        repositories = {name.removeprefix("me/"): repository["files"] for name, repository in hub.repositories.items()}
    ids, whole = torch.arange(3, 15)[None], sum(p.numel() for p in model.parameters()) * 4
    assert set(repositories) == {"model", "view", "Trainer", "TRL"}
    for way, files in repositories.items():
        assert {"adapter_config.json", "adapter_model.safetensors", "doratune.json"} <= set(files), way
        for name, content in files.items():
            (tmp_path / "arrived" / way / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "arrived" / way / name).write_bytes(content)
        assert torch.equal(doratune.load(tiny_llama(), tmp_path / "arrived" / way)(ids).logits, model(ids).logits), way
        assert sum(map(len, files.values())) < whole, way  # nothing of the base
