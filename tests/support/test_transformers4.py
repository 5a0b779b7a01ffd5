"""Folders that transformers 5 wrote hold what transformers 4 looks for, and transformers 5 reads them as before."""

import json

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from doratune.cli.main import main
from doratune.support.transformers4 import readable_by_both

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e5}


def text_config(**settings):
    return transformers.LlamaConfig(**SIZES, **settings)


CONFIGS = {
    "another theta": (text_config(rope_parameters=PLAIN, dtype="bfloat16"), {"rope_theta": 1e5}),
    "llama 3": (
        text_config(rope_parameters=LLAMA3),
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    ),
    "a part of each head": (
        transformers.PhiConfig(**SIZES, rope_parameters=PLAIN | {"partial_rotary_factor": 0.25}),
        {"rope_theta": 1e5, "partial_rotary_factor": 0.25},
    ),
    "by kind of layer": (transformers.Gemma3TextConfig(**SIZES, head_dim=8), {}),
    "no rotation": (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4), {}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_it_in_both_ways(name, tmp_path):
    config, older = CONFIGS[name]
    config.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    readable_by_both(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    assert before.items() <= after.items()
    added = {key: after[key] for key in after.keys() - before.keys()}
    assert added == older | ({"torch_dtype": before["dtype"]} if "dtype" in before else {})
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}


def test_a_part_of_a_model_has_its_own(tmp_path):
    text, vision = text_config(rope_parameters=PLAIN), transformers.CLIPVisionConfig(hidden_size=36)
    transformers.LlavaConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    readable_by_both(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["rope_theta"] == 1e5
    assert AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters == PLAIN


def test_a_config_of_an_unknown_class_stays(tmp_path):
    held = {"model_type": "mine", "rope_parameters": PLAIN, "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(held))
    readable_by_both(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == held


class Turned(transformers.PretrainedConfig):
    """Reads the older name before the newer, and keeps it."""

    model_type = "turned_by_its_own_rule"

    def __init__(self, rope_theta=None, **settings):
        super().__init__(**settings)
        self.rope_theta = rope_theta


def test_a_config_that_would_be_read_otherwise_stays(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, Turned.model_type, Turned)
    held = {"model_type": Turned.model_type, "rope_parameters": PLAIN}
    (tmp_path / "config.json").write_text(json.dumps(held))
    readable_by_both(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == held


def test_a_tokenizer_has_the_names_of_both(tmp_path):
    words = Tokenizer(models.WordLevel({"<s>": 0, "<a>": 1, "<b>": 2, "yes": 3}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<s>", extra_special_tokens=["<a>", "<b>"])
    tokenizer.save_pretrained(tmp_path)
    readable_by_both(tmp_path)
    held = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert held["tokenizer_class"] == "PreTrainedTokenizerFast" and held["additional_special_tokens"] == ["<a>", "<b>"]
    assert "extra_special_tokens" not in held
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert type(read) is type(tokenizer) and list(map(str, read.extra_special_tokens)) == ["<a>", "<b>"]
    assert read("yes <a>")["input_ids"] == tokenizer("yes <a>")["input_ids"]


def test_what_training_and_merging_write(tiny_folder, tmp_path, monkeypatch):
    """A full fine-tune, an adapter and its merged model, of a base in the layout of transformers 5."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "items.json").write_text(json.dumps([{"instruction": "Is 2 even?", "input": "", "output": "true"}] * 8))
    shared = f"train --model {tiny_folder} --data items.json --max_steps 1 --batch_size 4 --tensorboard false --dtype float32"
    assert main([*shared.split(), "--method", "full", "--output", "full"]) == 0
    assert main([*shared.split(), "--rank", "2", "--output", "dora"]) == 0
    assert main(["merge", "--adapter", "dora/adapter", "--output", "merged"]) == 0
    for folder in ("full/model", "merged"):
        held = json.loads((tmp_path / folder / "config.json").read_text())
        assert held["rope_theta"] == held["rope_parameters"]["rope_theta"] and held["torch_dtype"] == held["dtype"]
    for folder in ("full/model", "dora/adapter", "merged"):
        assert json.loads((tmp_path / folder / "tokenizer_config.json").read_text())["tokenizer_class"] != "TokenizersBackend"
