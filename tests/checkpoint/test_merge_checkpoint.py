"""Streamed merging: the same weights as merging in memory, any dtype, shards, memory near one shard, clear errors."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from conftest import randomize, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import doratune
from doratune import AdapterConfig
from doratune.cli.main import main

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def prepare(build, folder, config, shard="1GB", dtype=torch.float32):
    """(base folder, adapter folder, attached model)"""
    model = build().to(dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    doratune.attach(model, config)
    randomize(model, scale=0.1)
    doratune.save(model, folder / "adapter")
    return folder / "base", folder / "adapter", model


def run(base, adapter, output, *options):
    arguments = ["--model", str(base), "--adapter", str(adapter), "--output", str(output), "--check", "false"]
    return main(["merge", *arguments, *options])


CASES = {
    "llama": (tiny_llama, AdapterConfig(rank=4), "1GB"),
    "shards": (tiny_llama, AdapterConfig(rank=4, targets=["q_proj", "down_proj"]), "20KB"),
    "conv1d": (tiny_gpt2, AdapterConfig(rank=4, targets=["c_attn", "c_fc"]), "1GB"),
    "magnitude only": (tiny_llama, AdapterConfig(rank=4, targets=["q_proj"], magnitude_only=["o_proj"]), "1GB"),
    "input axis": (tiny_llama, AdapterConfig(rank=4, magnitude_axis="input"), "1GB"),
    "lora": (tiny_llama, AdapterConfig(rank=4, method="lora"), "1GB"),
    "also train": (tiny_llama, AdapterConfig(rank=4, targets=["q_proj"], also_train=["lm_head"]), "20KB"),
    "untied": (lambda: tiny_llama(tie=True), AdapterConfig(rank=4, targets=["q_proj"], also_train=["lm_head"]), "1GB"),
}


@pytest.mark.parametrize("name", CASES)
def test_streamed_equals_in_memory(name, tmp_path):
    build, config, shard = CASES[name]
    base, adapter, model = prepare(build, tmp_path, config, shard)
    if config.also_train:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.1)
        doratune.save(model, adapter)
    assert run(base, adapter, tmp_path / "merged") == 0
    doratune.merge(model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(merged(input_ids=IDS).logits, model(input_ids=IDS).logits)
    files = {p.name for p in (tmp_path / "merged").iterdir()}
    assert not files & {"adapter_config.json", "doratune.json"}
    if shard != "1GB":
        assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(("base_dtype", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", None)])
def test_any_dtype_and_the_check(base_dtype, dtype, tmp_path, tiny_tokenizer, capsys):
    base, adapter, model = prepare(tiny_llama, tmp_path, AdapterConfig(rank=4), dtype=getattr(torch, base_dtype))
    tiny_tokenizer.save_pretrained(base)
    options = ["--model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "m"), "--json"]
    assert main(["merge", *options, *(["--dtype", dtype] if dtype else [])]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["ok"]
    expected = dtype or base_dtype
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{expected}"}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == expected
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == getattr(torch, expected)


def test_the_adapter_knows_its_base(tmp_path, tiny_tokenizer, capsys):
    from doratune.support.models import load_model

    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    doratune.attach(model, AdapterConfig(rank=2))
    doratune.save(model, tmp_path / "adapter")
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "m")]) == 0
    doratune.detach(model)
    doratune.attach(model, AdapterConfig(rank=2))
    model.config._name_or_path = ""
    doratune.save(model, tmp_path / "nameless")
    capsys.readouterr()
    assert main(["merge", "--adapter", str(tmp_path / "nameless"), "--output", str(tmp_path / "n")]) == 2
    assert "records no base model; give --model" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("magnitude", [1.0, 1.05])
def test_greedy_answers_that_stay_the_same_are_counted(dtype, magnitude, tmp_path, tiny_tokenizer):
    """As transformers' own greedy decoding has them, of base + adapter and of the merged folder; also of a merge that is wrong."""
    from doratune.checkpoint.logits import NEW_TOKENS, SENTENCES, agreement

    base, adapter, model = prepare(tiny_llama, tmp_path, AdapterConfig(rank=4), dtype=getattr(torch, dtype))
    tiny_tokenizer.save_pretrained(base)
    assert main(["merge", "--model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "m")]) == 0
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            layer.magnitude.mul_(magnitude)
    doratune.save(model, tmp_path / "other")
    found = agreement(str(base), tmp_path / "other", tmp_path / "m", dtype)
    trained = doratune.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "other")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    trained.generation_config.eos_token_id = merged.generation_config.eos_token_id = None
    same = 0
    for sentence in SENTENCES:
        ids = tiny_tokenizer(sentence, return_tensors="pt")["input_ids"]
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW_TOKENS}
        ours, theirs = (one.generate(ids, **settings)[0, ids.shape[1] :] for one in (trained, merged))
        same += int((ours == theirs).long().cumprod(0).sum())
    assert found.greedy == (same, NEW_TOKENS * len(SENTENCES))
    assert f"{same} of {NEW_TOKENS * len(SENTENCES)} tokens stay the same" in str(found)
    assert ("--dtype float32" in str(found)) == (dtype == "bfloat16" and same < NEW_TOKENS * len(SENTENCES))


def test_a_wrong_merge_is_found(tmp_path, tiny_tokenizer):
    """The check must be able to fail: compare with another adapter."""
    from doratune.checkpoint.logits import agreement

    base, adapter, model = prepare(tiny_llama, tmp_path, AdapterConfig(rank=4))
    tiny_tokenizer.save_pretrained(base)
    assert run(base, adapter, tmp_path / "m") == 0
    assert agreement(str(base), adapter, tmp_path / "m", "float32").ok
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            layer.magnitude.mul_(1.01)
    doratune.save(model, tmp_path / "other")
    assert not agreement(str(base), tmp_path / "other", tmp_path / "m", "float32").ok


def test_mistakes_leave_nothing_behind(tmp_path, capsys):
    base, adapter, _ = prepare(tiny_llama, tmp_path, AdapterConfig(rank=4, targets=["q_proj"]))
    tiny_gpt2().save_pretrained(tmp_path / "other")
    capsys.readouterr()
    output = tmp_path / "merged"

    def fails(message, *arguments):
        assert run(*arguments) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
        assert not output.exists()
        assert not list(tmp_path.glob(".merged*"))

    fails("no such model folder", tmp_path / "none", adapter, output)
    fails("not a folder", base, tmp_path / "none", output)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    fails("truncated or corrupt", base, adapter, output)
    weights.unlink()
    fails("no weights", base, adapter, output)
    weights.write_bytes(whole)
    fails("q_proj", tmp_path / "other", adapter, output)
    assert run(base, adapter, base) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["merge", "--model", str(base), "--output", str(output)]) == 2
    assert "adapter is not set" in capsys.readouterr().err


def test_memory_stays_near_one_shard(tmp_path):
    """Eight shards of 8 MiB: the peak of a process that merges them stays far below the whole."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="42MB")
    doratune.attach(model, AdapterConfig(rank=2))
    doratune.save(model, tmp_path / "adapter")
    total = sum(p.stat().st_size for p in (tmp_path / "base").glob("*.safetensors"))
    assert total > 300 * 2**20
    code = (
        "import resource, sys\n"
        "from doratune.checkpoint.merge import merge_checkpoint\n"
        "import transformers.models.llama.modeling_llama\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "merge_checkpoint(*sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    folders = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    out = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True).stdout
    extra = int(out.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    assert extra < total / 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
