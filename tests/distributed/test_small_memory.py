"""Merging a model that is larger than the memory of the process: shard by shard.

The limit is on data (RLIMIT_DATA), to which a mapped file counts: 53 MB for the largest shard, and 41 for what is merged in it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import quiet
from safetensors.torch import load_file, save_file
from torch import nn

import doratune

MEGABYTE = 2**20

LIMITED = """
import resource, sys
import doratune.checkpoint.merge, doratune.cli.merge, transformers.models.llama.modeling_llama
from doratune.cli.main import main

used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
limit = used + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print("limit", limit, flush=True)
sys.exit(main(sys.argv[2:]))
"""


def large_llama(layers=12):
    """800 MB of fp32, with rows that are not all alike."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": layers, "vocab_size": 300}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    values: dict = {}
    for name, p in list(model.named_parameters()):
        if p.shape not in values:
            values[p.shape] = torch.arange(p.numel()).remainder_(997).sub_(498).mul(1e-4).view(p.shape)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(values[p.shape].clone()))
    return model.eval()


def write_shards(model, folder):
    """Three or four tensors a file."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    items = list(model.state_dict().items())
    weight_map = {}
    for start in range(0, len(items), 4):
        part = dict(items[start : start + 4])
        save_file(part, folder / f"model-{start:05}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-{start:05}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_a_model_larger_than_the_memory_is_merged(tmp_path):
    try:
        model = large_llama()
        size = sum(p.nbytes for p in model.parameters())
        write_shards(model, tmp_path / "base")
        doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["down_proj", "v_proj"]))
        with torch.no_grad():
            for _, layer in doratune.adapters(model):
                layer.lora_B.fill_(0.02)
                layer.magnitude.mul_(1.3)
        doratune.save(model, tmp_path / "adapter")
        words = ["merge", "--model", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out"]
        command = [sys.executable, "-c", LIMITED, 120 * MEGABYTE, *words, "--check", "false"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, env=quiet())
        assert done.returncode == 0, done.stderr[-3000:]
        assert int(done.stdout.split()[1]) < size
        doratune.merge(model, keep="none")
        expected, keys = model.state_dict(), set()
        for shard in (tmp_path / "out").glob("*.safetensors"):
            for key, t in load_file(shard).items():
                keys.add(key)
                assert (t - expected[key]).abs().max() < 1e-6
        assert keys == expected.keys()
    finally:
        for name in os.listdir(tmp_path):
            shutil.rmtree(tmp_path / name)
