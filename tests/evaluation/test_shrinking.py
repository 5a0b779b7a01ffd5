"""Rows that have ended leave the batch: the same tokens as in one call, and fewer rows in the model's passes."""

import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import Cache

from doratune import baselines
from doratune.evaluation.shrinking import leaves, write

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
OPEN = {"tie_word_embeddings": False}  # tied, a drawn model says its last token again and again
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, **OPEN, num_key_value_heads=2),
    "window": transformers.MistralConfig(**SIZES, **OPEN, num_key_value_heads=2, sliding_window=8),
    "mixed": transformers.Gemma3TextConfig(**SIZES, **OPEN, num_key_value_heads=2, head_dim=8, sliding_window=8),
    "gpt2": transformers.GPT2Config(**OPEN, n_embd=32, n_layer=2, n_head=4, vocab_size=300),
    "states": transformers.MambaConfig(**OPEN, hidden_size=32, num_hidden_layers=2, vocab_size=300, state_size=4),
}
ENDS = list(range(100, 125))
ROWS, LENGTH, NEW = 12, 9, 40


def batch():
    """(ids, mask) of prompts of several lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        mask[row, : row % 4] = 0
    return ids.masked_fill(mask == 0, 0), mask


def model_of(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    model.generation_config = GenerationConfig()
    return model


class Passes:
    """Rows in each pass of a model."""

    def __init__(self, model):
        self.rows = []
        model.register_forward_pre_hook(lambda m, args, kwargs: self.rows.append(len(kwargs["input_ids"])), with_kwargs=True)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_tokens_are_those_of_one_call(name):
    model, (ids, mask) = model_of(name), batch()
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=ENDS)
    whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, LENGTH:]
    passes = Passes(model)
    rows = write(model, ids, mask, settings, LogitsProcessorList())
    lengths = [next((i + 1 for i, token in enumerate(row.tolist()) if token in ENDS), NEW) for row in whole]
    assert len(set(lengths)) > 4
    for row, one in zip(rows, whole):
        assert row.tolist() == one[: len(row)].tolist() and not one[len(row) :].any()
    if leaves(model):
        assert passes.rows == sorted(passes.rows, reverse=True) and passes.rows[0] == ROWS
        assert len(passes.rows) == max(lengths) and sum(passes.rows) <= 4 / 3 * sum(lengths) + ROWS
    else:
        assert set(passes.rows) == {ROWS} and name == "states"


@torch.no_grad()
def test_rows_that_are_settled_leave_too():
    """Each row by a rule of its own, which is asked with the row's number in the batch."""
    model, (ids, mask) = model_of("llama"), batch()
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=299)
    asked = []

    def settled(new, rows):
        asked.append(list(rows))
        return torch.tensor([new.shape[1] >= 2 * (row + 1) for row in rows])

    rows = write(model, ids, mask, settings, LogitsProcessorList(), settled)
    whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, LENGTH:]
    for number, row in enumerate(rows):
        written = row[row != 0]
        assert written.tolist() == whole[number][: len(written)].tolist() and len(written) == 2 * (number + 1)
    assert asked[0] == list(range(ROWS)) and asked[-1] == [11]


@torch.no_grad()
def test_the_most_tokens_are_of_all_calls_together():
    model, (ids, mask) = model_of("llama"), batch()
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=ENDS)
    assert max(len(row) for row in write(model, ids, mask, settings, LogitsProcessorList())) == 5


@torch.no_grad()
def test_what_stands_beside_the_tokens_is_for_one_call():
    model, (ids, mask) = model_of("llama"), batch()
    passes = Passes(model)
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=ENDS)
    write(model, ids, mask, settings, LogitsProcessorList(), beside={"use_cache": True})
    assert set(passes.rows) == {ROWS}


@pytest.mark.parametrize("case", ["prefix", "another memory"])
@torch.no_grad()
def test_whatever_remembers_the_past(case, monkeypatch):
    """Prefix tuning, which adds keys and values to each call; a memory of which no rows can be taken, so that all is read again."""
    model, (ids, mask) = model_of("llama"), batch()
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=ENDS)
    if case == "prefix":
        baselines.attach(model, baselines.BaselineConfig(method="prefix", size=5))
    whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, LENGTH:]
    if case == "another memory":
        monkeypatch.delattr(Cache, "batch_select_indices")
    for row, one in zip(write(model, ids, mask, settings, LogitsProcessorList()), whole, strict=True):
        assert row.tolist() == one[: len(row)].tolist() and not one[len(row) :].any()
