"""A merged folder in transformers 4.57, whose engines are in use still: the same logits, tokens and chat, by a process of its own.

It is installed from the package index, so with DORATUNE_INSTALL=1 only.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

import doratune
from doratune.checkpoint.merge import merge_checkpoint

PACKAGES = ["transformers==4.57.6", "huggingface-hub<1", "tokenizers==0.22.2"]
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 300, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
BASES = {
    "theta": transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "yarn": transformers.Qwen3Config(**SIZES, head_dim=8, rope_parameters=YARN),
    "partial": transformers.PhiConfig(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.25}
    ),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300),
}
READ = """
import json, sys
import torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
said = {}
for folder in sys.argv[1:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "true"}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer("the correct answer is answer1")["input_ids"]
    with torch.no_grad():
        logits = model(torch.arange(3, 99)[None]).logits
    torch.save(logits, folder + "/logits.pt")
    said[folder] = [chat, ids, tokenizer.pad_token]
print(json.dumps(said))
"""


@pytest.mark.skipif(not os.environ.get("DORATUNE_INSTALL"), reason="installs packages: DORATUNE_INSTALL=1")
def test_merged_folders_in_transformers_4(tiny_tokenizer, tmp_path):
    place = tmp_path / "packages"
    words = ["install", "-q", "--disable-pip-version-check", "--no-deps", "--target", str(place), *PACKAGES]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=300)
    folders = {name: merged(config, tiny_tokenizer, tmp_path / name) for name, config in BASES.items()}
    command = [sys.executable, "-c", READ, *map(str, folders.values())]
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    said = json.loads(result.stdout.splitlines()[-1])
    chat = tiny_tokenizer.apply_chat_template([{"role": "user", "content": "true"}], tokenize=False, add_generation_prompt=True)
    for name, folder in folders.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            here = model(torch.arange(3, 99)[None]).logits
        there = torch.load(folder / "logits.pt")
        assert (here - there).abs().max() < 1e-5, (name, (here - there).abs().max())
        assert said[str(folder)] == [chat, tiny_tokenizer("the correct answer is answer1")["input_ids"], "<pad>"], name


def merged(config, tokenizer, folder):
    """The folder of a base with drawn weights, merged with an adapter whose tensors were all moved."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    doratune.attach(model, doratune.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    doratune.save(model, folder / "adapter")
    merge_checkpoint(str(folder / "base"), folder / "adapter", folder / "merged")
    return folder / "merged"
