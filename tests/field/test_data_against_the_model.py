"""Tokens, padding and lengths are held against the model before anything runs: in training, scoring and measuring."""

import copy
import json

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, BloomConfig, CTRLConfig, GPTJConfig, GPTNeoConfig, OPTConfig

from doratune.cli.main import main
from doratune.data.limits import check_tokens
from doratune.errors import UserError


def of(config):
    return lambda: AutoModelForCausalLM.from_config(config)


SMALL = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 128}
TABLES = {
    "gpt2": tiny_gpt2,
    "opt": of(
        OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32,
                  max_position_embeddings=128)
    ),
    "gptj": of(GPTJConfig(**SMALL, rotary_dim=4)),
    "gpt neo": of(
        GPTNeoConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128,
                     attention_types=[[["global", "local"], 1]])
    ),
    "ctrl": of(CTRLConfig(**SMALL, dff=32)),
}  # fmt: skip
"""Models whose positions are a table: an embedding, one with an offset, a buffer, a mask, a plain tensor."""
FREE = {
    "llama": tiny_llama,
    "bloom": of(BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=4)),
}


def runs(model, length) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5))
        return True
    except (IndexError, RuntimeError):
        return False


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_refused_is_what_would_fail(kind, tiny_tokenizer):
    model = TABLES[kind]().eval()
    assert runs(model, 128) and not runs(model, 129)
    assert check_tokens(model, tiny_tokenizer, [[5] * 128]) == []
    with pytest.raises(UserError, match="longest example has 129 tokens, the model 128 positions; set max_length to 128"):
        check_tokens(model, tiny_tokenizer, [[5], [5] * 129])
    with pytest.raises(UserError, match="120 tokens and 10 to write, the model 128 positions"):
        check_tokens(model, tiny_tokenizer, [[5] * 120], 10)


@pytest.mark.parametrize("kind", FREE)
def test_what_runs_is_at_most_a_note(kind, tiny_tokenizer):
    model = FREE[kind]().eval()
    assert runs(model, 300)
    notes = check_tokens(model, tiny_tokenizer, [[5] * 300])
    assert notes == (
        ["note: the longest example has 300 tokens; the model was pretrained on up to 256 positions"] * (kind == "llama")
    )


def test_widths_that_happen_to_be_the_number_of_positions(tiny_tokenizer):
    model = tiny_llama()
    model.config.max_position_embeddings = 32  # the hidden size
    assert "note" in check_tokens(model, tiny_tokenizer, [[5] * 40])[0]


@pytest.mark.parametrize("token", [300, 301, 100_000])
def test_a_token_outside_of_the_embedding(token, tiny_tokenizer):
    with pytest.raises(UserError, match=rf"token {token} .*outside of the model's embedding of 300 rows.*resize_token_embeddings"):
        check_tokens(tiny_llama(), tiny_tokenizer, [[5], [6, token, 7]])


def model_folder(tmp_path, tokenizer, make=tiny_llama):
    make().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def words_of(tmp_path, folder, items, *more):
    (tmp_path / "data.json").write_text(json.dumps(items))
    words = ["train", "--model", folder, "--data", str(tmp_path / "data.json"), "--output", str(tmp_path / "run"), "--rank", "2"]
    return [*words, "--max_steps", "1", "--dtype", "float32", "--tensorboard", "false", "--batch_size", "2", *more]


ITEMS = [
    {"instruction": "Is it?", "output": "true", "answer": "true"},
    {"instruction": "Or is it not so?", "output": "false", "answer": "false"},
]


def refused(words, capsys) -> str:
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    return error[-1]


def test_added_and_padding_tokens_in_training_and_scoring(tmp_path, tiny_tokenizer, capsys):
    pad, added, end = (copy.deepcopy(tiny_tokenizer) for _ in range(3))
    pad.add_special_tokens({"pad_token": "[PAD]"})
    added.add_tokens(["answer1"])
    end.add_special_tokens({"eos_token": "<|end|>"})
    items = [item | {"instruction": item["instruction"] + " answer1"} for item in ITEMS]
    for number, (tokenizer, words) in enumerate(((pad, "padding token '[PAD]'"), (added, "('answer1')"), (end, "('<|end|>')"))):
        folder = model_folder(tmp_path / str(number), tokenizer)
        error = refused(words_of(tmp_path, folder, items), capsys)
        assert words in error and "embedding of 300 rows" in error
        assert not (tmp_path / "run").exists()
        if tokenizer is not end:
            score = ["evaluate", "--model", folder, "--task", str(tmp_path / "data.json"), "--output", str(tmp_path / "scores")]
            assert words in refused(score, capsys)
            assert not (tmp_path / "scores").exists()


def test_an_example_longer_than_the_positions(tmp_path, tiny_tokenizer, capsys):
    folder = model_folder(tmp_path, tiny_tokenizer, tiny_gpt2)
    items = [item | {"instruction": item["instruction"] * 20} for item in ITEMS]
    targets = ["--targets", "[c_attn]"]
    assert "set max_length to 128" in refused(words_of(tmp_path, folder, items, *targets), capsys)
    assert not (tmp_path / "run").exists()
    assert main(words_of(tmp_path, folder, items, *targets, "--max_length", "128")) == 0
    score = ["evaluate", "--model", folder, "--task", str(tmp_path / "data.json"), "--output", str(tmp_path / "scores")]
    assert "leave out items of more than" in refused([*score, "--protocol", "likelihood"], capsys)
    assert not (tmp_path / "scores").exists()


def test_tasks_of_a_training_are_held_before_it(tmp_path, tiny_tokenizer, capsys):
    folder = model_folder(tmp_path, tiny_tokenizer, tiny_gpt2)
    (tmp_path / "task.json").write_text(json.dumps([item | {"instruction": item["instruction"] * 20} for item in ITEMS]))
    words = words_of(
        tmp_path, folder, ITEMS, "--targets", "[c_attn]", "--max_length", "100", "--tasks", f"[{tmp_path / 'task.json'}]"
    )
    assert "leave out items of more than" in refused(words, capsys)
    assert not (tmp_path / "run").exists()


def test_the_gradients_of_an_analysis(tiny_tokenizer, tmp_path):
    from doratune.analysis.gradients import batch_of

    (tmp_path / "data.json").write_text(json.dumps([ITEMS[0] | {"instruction": "so " * 200}]))
    with pytest.raises(UserError, match="128 positions"):
        batch_of(str(tmp_path / "data.json"), tiny_gpt2(), tiny_tokenizer)
